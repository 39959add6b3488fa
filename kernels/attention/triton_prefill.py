"""Flash attention in Triton: tiles of queries over tiles of keys, softmax online in fp32, LSE out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    q, k_ptr, v_ptr, k_st, v_st, factor, softcap, acc, total, largest, positions, start, stop, first, tk,
        window,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Keys [start, stop): MASKED where some (query, key) may be hidden. Sums are fp32, scores in log2."""
    offs_n, offs_d, offs_v = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for n in tl.range(start, stop, BLOCK_N):
        keys = n + offs_n
        k_at = k_ptr + keys[None, :].to(tl.int64) * k_st + offs_d[:, None]
        v_at = v_ptr + keys[:, None].to(tl.int64) * v_st + offs_v[None, :]
        if MASKED:
            k = tl.load(k_at, mask=(keys[None, :] < tk) & (offs_d[:, None] < D), other=0.0)
        elif D < BLOCK_D:
            k = tl.load(k_at, mask=offs_d[:, None] < D, other=0.0)
        else:
            k = tl.load(k_at)
        scores = tl.dot(q, k) * factor
        if SOFTCAP:  # tanh(x) = 1 - 2 / (1 + e^2x)
            capped = scores / softcap
            scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(capped * (2.0 * LOG2_E)))) * LOG2_E
        if MASKED:
            seen = (keys[None, :] < tk) & (keys[None, :] >= first)
            if CAUSAL:
                seen = seen & (keys[None, :] <= positions[:, None])
            if WINDOW:
                away = positions[:, None] - keys[None, :]
                seen = seen & (away < window) & (away > -window)
            scores = tl.where(seen, scores, float("-inf"))
        most = tl.maximum(largest, tl.max(scores, 1))
        safe = tl.where(most == float("-inf"), 0.0, most)
        weights = tl.exp2(scores - safe[:, None])
        decay = tl.exp2(largest - safe)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        if MASKED:
            v = tl.load(v_at, mask=(keys[:, None] < tk) & (offs_v[None, :] < DV), other=0.0)
        elif DV < BLOCK_DV:
            v = tl.load(v_at, mask=offs_v[None, :] < DV, other=0.0)
        else:
            v = tl.load(v_at)
        acc = tl.dot(weights.to(v.dtype), v, acc)
        largest = most
    return acc, total, largest


@triton.jit
def attention_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lengths_ptr, scale, softcap, window,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, o_sb, o_sh, o_st,
    heads, group, tq, tk, q_offset,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, B * H). The middle of a row's keys is read without masks, its ends with them."""
    # The last query tiles see most keys: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b, h = tl.program_id(1) // heads, tl.program_id(1) % heads
    offs_m, offs_d, offs_v = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    rows = tile * BLOCK_M + offs_m
    q_at = q_ptr + b.to(tl.int64) * q_sb + h.to(tl.int64) * q_sh
    q_at += rows[:, None].to(tl.int64) * q_st + offs_d[None, :]
    q = tl.load(q_at, mask=(rows[:, None] < tq) & (offs_d[None, :] < D), other=0.0)
    k_ptr += b.to(tl.int64) * k_sb + (h // group).to(tl.int64) * k_sh
    v_ptr += b.to(tl.int64) * v_sb + (h // group).to(tl.int64) * v_sh
    low_position = q_offset + tile * BLOCK_M
    high_position = low_position + BLOCK_M - 1
    first = 0
    if LENGTHS:
        first = tk - tl.load(lengths_ptr + b)
    lo = tl.maximum(first, 0)
    lo_whole = lo
    hi = tk + 0
    hi_whole = tk + 0
    if CAUSAL:
        hi = tl.minimum(hi, high_position + 1)
        hi_whole = tl.minimum(hi_whole, low_position + 1)
    if WINDOW:
        lo = tl.maximum(lo, low_position - window + 1)
        lo_whole = tl.maximum(lo_whole, high_position - window + 1)
        hi = tl.minimum(hi, high_position + window)
        hi_whole = tl.minimum(hi_whole, low_position + window)
    hi = tl.maximum(hi, 0)
    lo = tl.minimum(lo // BLOCK_N * BLOCK_N, hi)
    middle = tl.minimum((lo_whole + BLOCK_N - 1) // BLOCK_N * BLOCK_N, hi)
    middle = tl.maximum(middle, lo)
    tail = tl.maximum(tl.maximum(hi_whole, 0) // BLOCK_N * BLOCK_N, middle)
    factor = scale if SOFTCAP else scale * LOG2_E
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    positions = q_offset + rows
    if LENGTHS or WINDOW:
        acc, total, largest = _attend(
            q, k_ptr, v_ptr, k_st, v_st, factor, softcap, acc, total, largest, positions, lo, middle, first,
                tk,
            window, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, True, CAUSAL, WINDOW, SOFTCAP,
        )  # fmt: skip
    acc, total, largest = _attend(
        q, k_ptr, v_ptr, k_st, v_st, factor, softcap, acc, total, largest, positions, middle, tail, first, tk,
        window, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, False, CAUSAL, WINDOW, SOFTCAP,
    )  # fmt: skip
    acc, total, largest = _attend(
        q, k_ptr, v_ptr, k_st, v_st, factor, softcap, acc, total, largest, positions, tail, hi, first, tk,
        window, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, True, CAUSAL, WINDOW, SOFTCAP,
    )  # fmt: skip
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    out_at = out_ptr + b.to(tl.int64) * o_sb + h.to(tl.int64) * o_sh
    out_at += rows[:, None].to(tl.int64) * o_st + offs_v[None, :]
    inside = rows < tq
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (offs_v[None, :] < DV))
    lse = tl.where(empty, float("-inf"), (largest + tl.log2(tl.where(empty, 1.0, total))) * LN_2)
    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * tq + rows, lse, mask=inside)


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int, softcap: float, scale: float,
        q_offset: int,
    lengths: Tensor | None, out: Tensor, configuration: Mapping[str, Any],
) -> Tensor:  # fmt: skip
    """Launch `attention_forward` into `out`; return lse fp32 [B, H, Tq]."""
    batch, heads, tq, d = q.shape
    dv = v.shape[3]
    lse = torch.empty(batch, heads, tq, dtype=torch.float32, device=q.device)
    settings = dict(configuration)
    block_m = settings["BLOCK_M"]
    attention_forward[(triton.cdiv(tq, block_m), batch * heads)](
        q, k, v, out, lse, lse if lengths is None else lengths, scale, softcap, window,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        heads, heads // k.shape[1], tq, k.shape[2], q_offset,
        D=d, DV=dv, BLOCK_D=triton.next_power_of_2(d), BLOCK_DV=triton.next_power_of_2(dv),
        CAUSAL=causal, WINDOW=window > 0, SOFTCAP=softcap > 0, LENGTHS=lengths is not None, **settings,
    )  # fmt: skip
    return lse
