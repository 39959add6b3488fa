"""Rotary position embedding in Triton; the gradient is the rotation by the opposite angle."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .spec import RopeSpec


@triton.jit
def rope_rotate(
    x_ptr, cos_ptr, sin_ptr, out_ptr, x_sb, x_sh, x_st, o_sb, o_sh, o_st, table_sb, table_st, heads, sign,
    ROTARY: tl.constexpr, DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (positions, batch): one row of the tables serves all heads. Arithmetic is fp32, rounded once."""
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    HALF: tl.constexpr = ROTARY // 2
    pair = tl.arange(0, BLOCK_R)
    table = b * table_sb + t * table_st + pair
    cos = tl.load(cos_ptr + table, mask=pair < HALF, other=1.0)[None, :]
    sin = tl.load(sin_ptr + table, mask=pair < HALF, other=0.0)[None, :] * sign
    if INTERLEAVED:
        low, high = pair * 2, pair * 2 + 1
    else:
        low, high = pair, pair + HALF
    for first in tl.range(0, heads, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        x_row = x_ptr + b * x_sb + h[:, None].to(tl.int64) * x_sh + t * x_st
        o_row = out_ptr + b * o_sb + h[:, None].to(tl.int64) * o_sh + t * o_st
        inside = (h[:, None] < heads) & (pair[None, :] < HALF)
        x = tl.load(x_row + low[None, :], mask=inside, other=0.0).to(tl.float32)
        y = tl.load(x_row + high[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(o_row + low[None, :], (x * cos - y * sin).to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(o_row + high[None, :], (y * cos + x * sin).to(out_ptr.dtype.element_ty), mask=inside)
        if ROTARY < DIM:
            rest = ROTARY + tl.arange(0, BLOCK_D)
            kept = (h[:, None] < heads) & (rest[None, :] < DIM)
            tl.store(o_row + rest[None, :], tl.load(x_row + rest[None, :], mask=kept, other=0.0), mask=kept)


def rotate(
    spec: RopeSpec, x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None, inverse: bool = False
) -> Tensor:
    """Return x [B, H, T, D] rotated by tables [T, R/2] or [B, T, R/2]; `out` may be x."""
    batch, heads, positions, dim = x.shape
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rotary = spec.rotary_dim
    rope_rotate[(positions, batch)](
        x, cos, sin, out, *x.stride()[:3], *out.stride()[:3],
        cos.stride(0) if cos.dim() == 3 and cos.shape[0] > 1 else 0, cos.stride(-2), heads,
            -1.0 if inverse else 1.0,
        ROTARY=rotary, DIM=dim, INTERLEAVED=spec.interleaved,
        BLOCK_H=min(8, triton.next_power_of_2(heads)), BLOCK_R=triton.next_power_of_2(rotary // 2),
        BLOCK_D=triton.next_power_of_2(max(1, dim - rotary)),
    )  # fmt: skip
    return out
