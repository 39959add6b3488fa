"""Gradients of flash attention in Triton: dq by tiles of queries, dk and dv by tiles of keys; no atomics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _weights_and_slope(
    q, k, positions, keys, lse, scale, softcap, window, first, tq_inside, tk,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Softmax weights [M, N] of q [M, D] and k [D, N], and d(score) / d(scale * q.k)."""
    scores = tl.dot(q, k) * scale
    slope = tl.full(scores.shape, 1.0, tl.float32)
    if SOFTCAP:
        bent = 1.0 - 2.0 / (1.0 + tl.exp2(scores / softcap * (2.0 * LOG2_E)))
        scores = softcap * bent
        slope = 1.0 - bent * bent
    seen = tq_inside[:, None] & (keys[None, :] < tk) & (keys[None, :] >= first)
    if CAUSAL:
        seen = seen & (keys[None, :] <= positions[:, None])
    if WINDOW:
        away = positions[:, None] - keys[None, :]
        seen = seen & (away < window) & (away > -window)
    weights = tl.exp2(tl.where(seen, scores - lse[:, None], float("-inf")) * LOG2_E)
    return weights, slope


@triton.jit
def attention_grad_q(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, lengths_ptr, dq_ptr, scale, softcap, window,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, o_sb, o_sh, o_st,
    heads, group, tq, tk, q_offset,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, B * H); dq has q's strides."""
    tile, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // heads, bh % heads
    offs_d, offs_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside, positions = rows < tq, q_offset + rows
    at = b.to(tl.int64) * q_sb + h.to(tl.int64) * q_sh + rows[:, None].to(tl.int64) * q_st + offs_d[None, :]
    m_q = inside[:, None] & (offs_d[None, :] < D)
    q = tl.load(q_ptr + at, mask=m_q, other=0.0)
    o_at = b.to(tl.int64) * o_sb + h.to(tl.int64) * o_sh + rows[:, None].to(tl.int64) * o_st + offs_v[None, :]
    do = tl.load(do_ptr + o_at, mask=inside[:, None] & (offs_v[None, :] < DV), other=0.0)
    lse = tl.load(lse_ptr + bh.to(tl.int64) * tq + rows, mask=inside, other=0.0)
    delta = tl.load(delta_ptr + bh.to(tl.int64) * tq + rows, mask=inside, other=0.0)
    k_ptr += b.to(tl.int64) * k_sb + (h // group).to(tl.int64) * k_sh
    v_ptr += b.to(tl.int64) * v_sb + (h // group).to(tl.int64) * v_sh
    first = 0
    if LENGTHS:
        first = tk - tl.load(lengths_ptr + b)
    lo = tl.maximum(first, 0)
    hi = tk + 0
    if CAUSAL:
        hi = tl.minimum(hi, q_offset + (tile + 1) * BLOCK_M)
    if WINDOW:
        lo = tl.maximum(lo, q_offset + tile * BLOCK_M - window + 1)
        hi = tl.minimum(hi, q_offset + (tile + 1) * BLOCK_M - 1 + window)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n in tl.range(lo // BLOCK_N * BLOCK_N, hi, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        row = keys.to(tl.int64)
        k = tl.load(
            k_ptr + row[:, None] * k_st + offs_d[None, :],
            mask=(keys[:, None] < tk) & (offs_d[None, :] < D), other=0.0,
        )  # fmt: skip
        v = tl.load(
            v_ptr + row[:, None] * v_st + offs_v[None, :],
            mask=(keys[:, None] < tk) & (offs_v[None, :] < DV), other=0.0,
        )  # fmt: skip
        weights, slope = _weights_and_slope(
            q,
            tl.trans(k),
            positions,
            keys,
            lse,
            scale,
            softcap,
            window,
            first,
            inside,
            tk,
            CAUSAL,
            WINDOW,
            SOFTCAP,
        )
        ds = weights * (tl.dot(do, tl.trans(v)) - delta[:, None]) * slope
        dq = tl.dot(ds.to(k.dtype), k, dq)
    tl.store(dq_ptr + at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=m_q)


@triton.jit
def attention_grad_kv(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, lengths_ptr, dk_ptr, dv_ptr, scale, softcap, window,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, o_sb, o_sh, o_st,
    dk_sb, dk_sh, dk_st, dv_sb, dv_sh, dv_st,
    kv_heads, group, tq, tk, q_offset,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """Grid (key tiles, B * Hkv): all query heads of the group add to one tile, in order."""
    tile, bh = tl.program_id(0), tl.program_id(1)
    b, kv_head = bh // kv_heads, bh % kv_heads
    offs_d, offs_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row = keys.to(tl.int64)
    m_k = (keys[:, None] < tk) & (offs_d[None, :] < D)
    m_v = (keys[:, None] < tk) & (offs_v[None, :] < DV)
    k = tl.load(k_ptr + b.to(tl.int64) * k_sb + kv_head.to(tl.int64) * k_sh + row[:,
        None] * k_st + offs_d[None, :],
                mask=m_k, other=0.0)  # fmt: skip
    v = tl.load(v_ptr + b.to(tl.int64) * v_sb + kv_head.to(tl.int64) * v_sh + row[:,
        None] * v_st + offs_v[None, :],
                mask=m_v, other=0.0)  # fmt: skip
    first = 0
    if LENGTHS:
        first = tk - tl.load(lengths_ptr + b)
    lo = tq * 0
    hi = tq + 0
    if CAUSAL:
        lo = tl.maximum(lo, tile * BLOCK_N - q_offset)
    if WINDOW:
        lo = tl.maximum(lo, tile * BLOCK_N - window + 1 - q_offset)
        hi = tl.minimum(hi, (tile + 1) * BLOCK_N - 1 + window - q_offset)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for g in tl.range(0, group):
        h = kv_head * group + g
        stats = (b * kv_heads * group + h).to(tl.int64) * tq
        for m in tl.range(lo // BLOCK_M * BLOCK_M, hi, BLOCK_M):
            rows = m + tl.arange(0, BLOCK_M)
            inside = rows < tq
            q_at = q_ptr + b.to(tl.int64) * q_sb + h.to(tl.int64) * q_sh
            q = tl.load(q_at + rows[:, None].to(tl.int64) * q_st + offs_d[None, :],
                        mask=inside[:, None] & (offs_d[None, :] < D), other=0.0)  # fmt: skip
            o_at = do_ptr + b.to(tl.int64) * o_sb + h.to(tl.int64) * o_sh
            do = tl.load(o_at + rows[:, None].to(tl.int64) * o_st + offs_v[None, :],
                         mask=inside[:, None] & (offs_v[None, :] < DV), other=0.0)  # fmt: skip
            lse = tl.load(lse_ptr + stats + rows, mask=inside, other=0.0)
            delta = tl.load(delta_ptr + stats + rows, mask=inside, other=0.0)
            weights, slope = _weights_and_slope(
                q, tl.trans(k), q_offset + rows, keys, lse, scale, softcap, window, first, inside, tk,
                CAUSAL, WINDOW, SOFTCAP,
            )  # fmt: skip
            dv = tl.dot(tl.trans(weights.to(do.dtype)), do, dv)
            ds = weights * (tl.dot(do, tl.trans(v)) - delta[:, None]) * slope
            dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk)
    dk_at = dk_ptr + b.to(tl.int64) * dk_sb + kv_head.to(tl.int64) * dk_sh + row[:, None] * dk_st
    dv_at = dv_ptr + b.to(tl.int64) * dv_sb + kv_head.to(tl.int64) * dv_sh + row[:, None] * dv_st
    tl.store(dk_at + offs_d[None, :], (dk * scale).to(dk_ptr.dtype.element_ty), mask=m_k)
    tl.store(dv_at + offs_v[None, :], dv.to(dv_ptr.dtype.element_ty), mask=m_v)


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, *, causal: bool, window: int,
    softcap: float, scale: float, q_offset: int, lengths: Tensor | None,
    configurations: Mapping[str, Mapping[str, Any]],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dq, dk, dv) for the gradient `grad` [B, H, Tq, Dv] of `out`; a tile each for "q" and "kv"."""
    batch, heads, tq, d = q.shape
    dv_dim, tk, kv_heads = v.shape[3], k.shape[2], k.shape[1]
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    delta = (out.float() * grad.float()).sum(3).contiguous()
    dq, dk, dv = (torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in (q, k, v))
    if any(x.stride(1) == 0 or x.stride(0) == 0 for x in (k, v)):  # expanded: each needs its own memory
        dk, dv = torch.empty(k.shape, dtype=k.dtype, device=k.device), torch.empty_like(v).contiguous()
    for_q, for_kv = dict(configurations["q"]), dict(configurations["kv"])
    sizes = {
        "D": d,
        "DV": dv_dim,
        "BLOCK_D": triton.next_power_of_2(d),
        "BLOCK_DV": triton.next_power_of_2(dv_dim),
    }
    sizes |= {"CAUSAL": causal, "WINDOW": window > 0, "SOFTCAP": softcap > 0, "LENGTHS": lengths is not None}
    limits = lse if lengths is None else lengths
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    attention_grad_q[(triton.cdiv(tq, for_q["BLOCK_M"]), batch * heads)](
        q, k, v, grad, lse, delta, limits, dq, scale, softcap, window, *strides,
        heads, heads // kv_heads, tq, tk, q_offset, **sizes, **for_q,
    )  # fmt: skip
    attention_grad_kv[(triton.cdiv(tk, for_kv["BLOCK_N"]), batch * kv_heads)](
        q, k, v, grad, lse, delta, limits, dk, dv, scale, softcap, window, *strides,
        *dk.stride()[:3], *dv.stride()[:3], kv_heads, heads // kv_heads, tq, tk, q_offset, **sizes,
        **for_kv,
    )  # fmt: skip
    return dq, dk, dv
