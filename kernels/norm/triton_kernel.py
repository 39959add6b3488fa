"""RMSNorm and LayerNorm in Triton: a row a program, the residual added on the way, and the gradients."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .spec import NormSpec


@triton.jit
def norm_forward(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, dim, x_st, r_st, eps, offset,
    LAYER: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows): y = norm(x [+ residual]); with RESIDUAL the sum is stored too. Arithmetic is fp32."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    inside = offs < dim
    x = tl.load(x_ptr + row * x_st + offs, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        total = x + tl.load(residual_ptr + row * r_st + offs, mask=inside, other=0.0).to(tl.float32)
        rounded = total.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * dim + offs, rounded, mask=inside)
        x = rounded.to(tl.float32)
    if LAYER:
        x = tl.where(inside, x - tl.sum(x, 0) / dim, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, 0) / dim + eps)
    weight = tl.load(weight_ptr + offs, mask=inside, other=0.0).to(tl.float32) + offset
    y = x * inverse * weight
    if BIAS:
        y += tl.load(bias_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * dim + offs, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward(
    x_ptr, weight_ptr, dy_ptr, dx_ptr, dw_ptr, db_ptr, rows, dim, x_st, dy_st, eps, offset,
    LAYER: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (programs): dx of every `programs`-th row, and this program's share of dw and db, fp32
    [programs, D].
    """
    program = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    inside = offs < dim
    weight = tl.load(weight_ptr + offs, mask=inside, other=0.0).to(tl.float32) + offset
    dw = tl.zeros([BLOCK], tl.float32)
    db = tl.zeros([BLOCK], tl.float32)
    for r in tl.range(program, rows, tl.num_programs(0)):
        row = tl.cast(r, tl.int64)
        x = tl.load(x_ptr + row * x_st + offs, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_st + offs, mask=inside, other=0.0).to(tl.float32)
        if LAYER:
            x = tl.where(inside, x - tl.sum(x, 0) / dim, 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(x * x, 0) / dim + eps)
        normal = x * inverse
        dw += dy * normal
        db += dy
        slope = dy * weight
        dx = slope - normal * (tl.sum(slope * normal, 0) / dim)
        if LAYER:
            dx = dx - tl.sum(slope, 0) / dim
        tl.store(dx_ptr + row * dim + offs, (dx * inverse).to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dw_ptr + program.to(tl.int64) * dim + offs, dw, mask=inside)
    if BIAS:
        tl.store(db_ptr + program.to(tl.int64) * dim + offs, db, mask=inside)


def warps(dim: int) -> int:
    """Return the warps of a row: 8 or 16 elements a lane."""
    return max(1, min(16, triton.next_power_of_2(dim) // 512))


def forward(
    spec: NormSpec, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return (norm(x [+ residual]), the sum or None) for x [rows, D] with rows contiguous."""
    rows, dim = x.shape
    y = torch.empty(rows, dim, dtype=getattr(torch, spec.out_dtype), device=x.device)
    total = torch.empty_like(x, memory_format=torch.contiguous_format) if residual is not None else None
    norm_forward[(rows,)](
        x, x if residual is None else residual, weight, weight if bias is None else bias, y,
            y if total is None else total,
        dim, x.stride(0), 0 if residual is None else residual.stride(0), spec.eps, spec.weight_offset,
        LAYER=spec.kind == "layer", BIAS=bias is not None, RESIDUAL=residual is not None,
        BLOCK=triton.next_power_of_2(dim), num_warps=warps(dim),
    )  # fmt: skip
    return y, total


def backward(spec: NormSpec, x: Tensor, weight: Tensor, dy: Tensor, bias: bool) -> tuple[Any, ...]:
    """Return (dx, dweight, dbias or None); the sums over rows are fp32, in a fixed order."""
    rows, dim = x.shape
    programs = min(rows, 256)
    dx = torch.empty(rows, dim, dtype=x.dtype, device=x.device)
    dw = torch.empty(programs, dim, dtype=torch.float32, device=x.device)
    db = torch.empty_like(dw) if bias else dw
    norm_backward[(programs,)](
        x, weight, dy, dx, dw, db, rows, dim, x.stride(0), dy.stride(0), spec.eps, spec.weight_offset,
        LAYER=spec.kind == "layer", BIAS=bias, BLOCK=triton.next_power_of_2(dim), num_warps=warps(dim),
    )  # fmt: skip
    return dx, dw.sum(0).to(weight.dtype), db.sum(0).to(weight.dtype) if bias else None
