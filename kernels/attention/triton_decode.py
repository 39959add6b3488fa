"""Decode attention in Triton: keys split over programs, the heads of a group packed into rows, then a
merge.
"""

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
def attention_decode(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, part_ptr, part_lse_ptr, lengths_ptr, pages_ptr,
    scale, softcap, window,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, ks_sb, ks_sh, ks_st, pages_sb,
    kv_heads, group, tq, splits,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    INT8: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hkv, splits). Row r is query r // group, head r % group of the KV head; lse is in log2.

    PAGE 0: k [B, Hkv, T, D]. PAGE > 0: k [P, Hkv, PAGE, D] by its strides, `pages` int32 [B, *].
    """
    bh, split = tl.program_id(0), tl.program_id(1)
    b, kv_head = bh // kv_heads, bh % kv_heads
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    offs_d, offs_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    t, head = offs_m // group, kv_head * group + offs_m % group
    inside = offs_m < tq * group
    q_at = q_ptr + b.to(tl.int64) * q_sb + head[:, None].to(tl.int64) * q_sh + t[:, None].to(tl.int64) * q_st
    q = tl.load(q_at + offs_d[None, :], mask=inside[:, None] & (offs_d[None, :] < D), other=0.0)
    tk = tl.load(lengths_ptr + b)
    positions = tk - tq + t
    first = 0
    if WINDOW:
        first = tl.maximum(tk - tq - window + 1, 0) // BLOCK_N * BLOCK_N
    per_split = tl.cdiv(tl.cdiv(tk - first, splits), BLOCK_N) * BLOCK_N
    start = first + split * per_split
    stop = tl.minimum(start + per_split, tk)
    factor = scale if SOFTCAP else scale * LOG2_E
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for n in tl.range(start, stop, BLOCK_N):
        keys = n + offs_n
        there = keys < tk
        if PAGE == 0:
            outer = b.to(tl.int64)
            slots = keys
        elif PAGE % BLOCK_N == 0:  # one page a tile
            outer = tl.load(pages_ptr + b.to(tl.int64) * pages_sb + n // PAGE).to(tl.int64)
            slots = n % PAGE + offs_n
        else:
            outer = tl.load(pages_ptr + b.to(tl.int64) * pages_sb + keys // PAGE, mask=there, other=0).to(
                tl.int64
            )
            slots = keys % PAGE
        k_row = outer * k_sb + kv_head.to(tl.int64) * k_sh + slots.to(tl.int64) * k_st
        v_row = outer * v_sb + kv_head.to(tl.int64) * v_sh + slots.to(tl.int64) * v_st
        k = tl.load(
            k_ptr + k_row[None, :] + offs_d[:, None], mask=there[None, :] & (offs_d[:, None] < D), other=0
        )
        v = tl.load(
            v_ptr + v_row[:, None] + offs_v[None, :], mask=there[:, None] & (offs_v[None, :] < DV), other=0
        )
        scores = tl.dot(q, k.to(q.dtype)) * factor
        if INT8:
            s_row = outer * ks_sb + kv_head.to(tl.int64) * ks_sh + slots.to(tl.int64) * ks_st
            scores = scores * tl.load(k_scale_ptr + s_row, mask=there, other=0.0)[None, :]
        if SOFTCAP:
            capped = scores / softcap
            scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(capped * (2.0 * LOG2_E)))) * LOG2_E
        seen = there[None, :] & (keys[None, :] <= positions[:, None])
        if WINDOW:
            seen = seen & (positions[:, None] - keys[None, :] < window)
        scores = tl.where(seen, scores, float("-inf"))
        most = tl.maximum(largest, tl.max(scores, 1))
        safe = tl.where(most == float("-inf"), 0.0, most)
        weights = tl.exp2(scores - safe[:, None])
        decay = tl.exp2(largest - safe)
        total = total * decay + tl.sum(weights, 1)
        if INT8:
            weights = weights * tl.load(v_scale_ptr + s_row, mask=there, other=0.0)[None, :]
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * decay[:, None])
        largest = most
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, -1.0e30, largest + tl.log2(tl.where(empty, 1.0, total)))
    entry = ((b * kv_heads * group + head) * tq + t).to(tl.int64) * splits + split
    tl.store(
        part_ptr + entry[:, None] * DV + offs_v[None, :], acc, mask=inside[:, None] & (offs_v[None, :] < DV)
    )
    tl.store(part_lse_ptr + entry, lse, mask=inside)


@triton.jit
def attention_merge(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, splits, heads, tq, o_sb, o_sh, o_st,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * Tq): the partial results of one row, weighted by their log2 sums, always in one order."""
    row = tl.program_id(0)
    t, bh = row % tq, row // tq
    offs_s, offs_v = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_DV)
    lse = tl.load(part_lse_ptr + row.to(tl.int64) * splits + offs_s, mask=offs_s < splits, other=-1.0e30)
    most = tl.max(lse, 0)
    weights = tl.where(lse > -1.0e29, tl.exp2(lse - most), 0.0)
    total = tl.sum(weights, 0)
    entries = row.to(tl.int64) * splits + offs_s
    inside = (offs_s[:, None] < splits) & (offs_v[None, :] < DV)
    parts = tl.load(part_ptr + entries[:, None] * DV + offs_v[None, :], mask=inside, other=0.0)
    empty = total == 0.0
    out = tl.sum(parts * weights[:, None], 0) / tl.where(empty, 1.0, total)
    at = (
        out_ptr + (bh // heads).to(tl.int64) * o_sb + (bh % heads).to(tl.int64) * o_sh + t.to(tl.int64) * o_st
    )
    tl.store(at + offs_v, out.to(out_ptr.dtype.element_ty), mask=offs_v < DV)
    natural = tl.where(empty, float("-inf"), (most + tl.log2(tl.where(empty, 1.0, total))) * LN_2)
    tl.store(lse_ptr + row, natural)


def decode(
    q: Tensor, k: Tensor, v: Tensor, *, lengths: Tensor, scale: float, softcap: float = 0.0, window: int = 0,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, pages: Tensor | None = None,
    splits: int, out: Tensor, configuration: Mapping[str, Any],
) -> Tensor:  # fmt: skip
    """Launch the two kernels into `out` [B, H, Tq, Dv]; return lse fp32 [B, H, Tq]. `lengths` int32 [B]."""
    batch, heads, tq, d = q.shape
    kv_heads, dv = k.shape[1], v.shape[3]
    group = heads // kv_heads
    parts = torch.empty(batch * heads * tq * splits, dv, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(batch * heads * tq * splits, dtype=torch.float32, device=q.device)
    scales = part_lse if k_scale is None else k_scale
    attention_decode[(batch * kv_heads, splits)](
        q, k, v, scales, part_lse if v_scale is None else v_scale, parts, part_lse, lengths,
        lengths if pages is None else pages, scale, softcap, window,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *(scales.stride()[:3] if k_scale is not None else (0,) * 3),
        0 if pages is None else pages.stride(0), kv_heads, group, tq, splits,
        D=d, DV=dv, BLOCK_D=triton.next_power_of_2(d), BLOCK_DV=triton.next_power_of_2(dv),
        BLOCK_M=max(16, triton.next_power_of_2(group * tq)), PAGE=0 if pages is None else k.shape[2],
        INT8=k_scale is not None, WINDOW=window > 0, SOFTCAP=softcap > 0, **configuration,
    )  # fmt: skip
    return merge(parts, part_lse, splits, out)


def merge(parts: Tensor, part_lse: Tensor, splits: int, out: Tensor) -> Tensor:
    """Launch `attention_merge` into `out` [B, H, Tq, Dv]; return lse fp32 [B, H, Tq]."""
    batch, heads, tq, dv = out.shape
    lse = torch.empty(batch, heads, tq, dtype=torch.float32, device=out.device)
    attention_merge[(batch * heads * tq,)](
        parts, part_lse, out, lse, splits, heads, tq, *out.stride()[:3],
        DV=dv, BLOCK_DV=triton.next_power_of_2(dv), BLOCK_S=triton.next_power_of_2(splits),
    )  # fmt: skip
    return lse


def splits_for(rows: int, keys: int, units: int, block_n: int) -> int:
    """Return how many programs share a row's keys: about four a compute unit in all, a power of two."""
    wanted = max(1, 4 * units // max(1, rows))
    most = max(1, min(128, keys // (4 * block_n)))
    return 1 << (min(wanted, most).bit_length() - 1)
