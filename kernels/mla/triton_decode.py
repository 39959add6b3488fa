"""Latent attention in decode in Triton, over absorbed queries: one pass, or scores and values in two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention.triton_decode import merge

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def mla_decode(
    q_ptr, cache_ptr, part_ptr, part_lse_ptr, lengths_ptr, scale, q_sb, q_sh, q_st, c_sb, c_st,
    heads, tq, splits,
    R: tl.constexpr, DR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (B * Tq * head blocks, splits): the values are the first R elements of the keys' tile."""
    blocks = tl.cdiv(heads, BLOCK_M)
    program, split = tl.program_id(0), tl.program_id(1)
    bt, hb = program // blocks, program % blocks
    b, t = bt // tq, bt % tq
    offs_n, offs_r, offs_p = tl.arange(0, BLOCK_N), tl.arange(0, R), tl.arange(0, DR)
    head = hb * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = head < heads
    q_row = q_ptr + b.to(tl.int64) * q_sb + head[:, None].to(tl.int64) * q_sh + t.to(tl.int64) * q_st
    q = tl.load(q_row + offs_r[None, :], mask=inside[:, None], other=0.0)
    q_rope = tl.load(q_row + R + offs_p[None, :], mask=inside[:, None], other=0.0)
    tk = tl.load(lengths_ptr + b) - tq + t + 1
    per_split = tl.cdiv(tl.cdiv(tk, splits), BLOCK_N) * BLOCK_N
    start = split * per_split
    stop = tl.minimum(start + per_split, tk)
    acc = tl.zeros([BLOCK_M, R], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for n in tl.range(start, stop, BLOCK_N):
        there = n + offs_n < tk
        row = cache_ptr + b.to(tl.int64) * c_sb + (n + offs_n).to(tl.int64)[:, None] * c_st
        c = tl.load(row + offs_r[None, :], mask=there[:, None], other=0.0)
        r = tl.load(row + R + offs_p[None, :], mask=there[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(c))
        scores = tl.dot(q_rope, tl.trans(r), scores) * (scale * LOG2_E)
        scores = tl.where(there[None, :], scores, float("-inf"))
        most = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - most[:, None])
        decay = tl.exp2(largest - most)
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(c.dtype), c, acc * decay[:, None])
        largest = most
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, -1.0e30, largest + tl.log2(tl.where(empty, 1.0, total)))
    entry = ((b * heads + head) * tq + t).to(tl.int64) * splits + split
    tl.store(part_ptr + entry[:, None] * R + offs_r[None, :], acc, mask=inside[:, None])
    tl.store(part_lse_ptr + entry, lse, mask=inside)


@triton.jit
def mla_scores(
    q_ptr, cache_ptr, scores_ptr, part_lse_ptr, lengths_ptr, scale, q_sb, q_sh, q_st, c_sb, c_st,
    heads, tq, splits, keys,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """First pass: log2 scores [B, H, Tq, keys] of a split, and its log2 sum. A slice of q and c at a time."""
    blocks = tl.cdiv(heads, BLOCK_M)
    program, split = tl.program_id(0), tl.program_id(1)
    bt, hb = program // blocks, program % blocks
    b, t = bt // tq, bt % tq
    offs_n, offs_r = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    head = hb * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = head < heads
    q_row = q_ptr + b.to(tl.int64) * q_sb + head[:, None].to(tl.int64) * q_sh + t.to(tl.int64) * q_st
    tk = tl.load(lengths_ptr + b) - tq + t + 1
    per_split = tl.cdiv(tl.cdiv(tk, splits), BLOCK_N) * BLOCK_N
    start = split * per_split
    stop = tl.minimum(start + per_split, tk)
    entry = ((b * heads + head) * tq + t).to(tl.int64)
    total = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for n in tl.range(start, stop, BLOCK_N):
        there = n + offs_n < tk
        row = cache_ptr + b.to(tl.int64) * c_sb + (n + offs_n).to(tl.int64)[:, None] * c_st
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for r in tl.range(0, DIM, BLOCK_R):
            q = tl.load(
                q_row + r + offs_r[None, :], mask=inside[:, None] & (r + offs_r < DIM)[None, :], other=0.0
            )
            c = tl.load(
                row + r + offs_r[None, :], mask=there[:, None] & (r + offs_r < DIM)[None, :], other=0.0
            )
            scores = tl.dot(q, tl.trans(c), scores)
        scores = tl.where(there[None, :], scores * (scale * LOG2_E), float("-inf"))
        at = scores_ptr + entry[:, None] * keys + (n + offs_n)[None, :]
        tl.store(at, scores, mask=inside[:, None] & there[None, :])
        most = tl.maximum(largest, tl.max(scores, 1))
        total = total * tl.exp2(largest - most) + tl.sum(tl.exp2(scores - most[:, None]), 1)
        largest = most
    lse = tl.where(total == 0.0, -1.0e30, largest + tl.log2(tl.where(total == 0.0, 1.0, total)))
    tl.store(part_lse_ptr + entry * splits + split, lse, mask=inside)


@triton.jit
def mla_values(
    scores_ptr, cache_ptr, part_ptr, part_lse_ptr, lengths_ptr, c_sb, c_st, heads, tq, splits, keys,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Second pass, grid (B * Tq * head blocks, splits, R / BLOCK_R): a slice of the weighted latents."""
    blocks = tl.cdiv(heads, BLOCK_M)
    program, split, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    bt, hb = program // blocks, program % blocks
    b, t = bt // tq, bt % tq
    offs_n = tl.arange(0, BLOCK_N)
    offs_r = part * BLOCK_R + tl.arange(0, BLOCK_R)
    head = hb * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = head < heads
    tk = tl.load(lengths_ptr + b) - tq + t + 1
    per_split = tl.cdiv(tl.cdiv(tk, splits), BLOCK_N) * BLOCK_N
    start = split * per_split
    stop = tl.minimum(start + per_split, tk)
    entry = ((b * heads + head) * tq + t).to(tl.int64)
    lse = tl.load(part_lse_ptr + entry * splits + split, mask=inside, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for n in tl.range(start, stop, BLOCK_N):
        there = n + offs_n < tk
        at = scores_ptr + entry[:, None] * keys + (n + offs_n)[None, :]
        scores = tl.load(at, mask=inside[:, None] & there[None, :], other=float("-inf"))
        row = cache_ptr + b.to(tl.int64) * c_sb + (n + offs_n).to(tl.int64)[:, None] * c_st
        c = tl.load(row + offs_r[None, :], mask=there[:, None] & (offs_r < R)[None, :], other=0.0)
        acc = tl.dot(tl.exp2(scores - lse[:, None]).to(c.dtype), c, acc)
    at = part_ptr + (entry[:, None] * splits + split) * R + offs_r[None, :]
    tl.store(at, acc, mask=inside[:, None] & (offs_r < R)[None, :])


def decode(
    q: Tensor, cache: Tensor, rank: int, *, lengths: Tensor, scale: float, splits: int, out: Tensor,
    configuration: Mapping[str, Any],
) -> Tensor:  # fmt: skip
    """Launch one or two passes over absorbed q [B, H, Tq, R + Dr] into `out` [B, H, Tq, R]; return lse.

    `lengths` int32 [B] are the cached tokens, the Tq new ones included; cache [B, capacity, R + Dr].
    """
    batch, heads, tq, dim = q.shape
    settings = dict(configuration)
    passes, block_r = settings.pop("passes"), settings.pop("BLOCK_R", 0)
    parts = torch.empty(batch * heads * tq * splits, rank, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(batch * heads * tq * splits, dtype=torch.float32, device=q.device)
    programs = batch * tq * triton.cdiv(heads, settings["BLOCK_M"])
    strides = (*q.stride()[:3], *cache.stride()[:2])
    if passes == 1:
        mla_decode[(programs, splits)](
            q, cache, parts, part_lse, lengths, scale, *strides, heads, tq, splits,
            R=rank, DR=dim - rank, **settings,
        )  # fmt: skip
        return merge(parts, part_lse, splits, out)
    keys = cache.shape[1]
    scores = torch.empty(batch * heads * tq, keys, dtype=torch.float32, device=q.device)
    mla_scores[(programs, splits)](
        q, cache, scores, part_lse, lengths, scale, *strides, heads, tq, splits, keys,
        DIM=dim, BLOCK_R=block_r, **settings,
    )  # fmt: skip
    mla_values[(programs, splits, triton.cdiv(rank, block_r))](
        scores, cache, parts, part_lse, lengths, *cache.stride()[:2], heads, tq, splits, keys,
        R=rank, BLOCK_R=block_r, **settings,
    )  # fmt: skip
    return merge(parts, part_lse, splits, out)
