"""silu(gate) * up in Triton, forward and backward: one pass over both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def gated_silu_forward(gate_ptr, up_ptr, out_ptr, columns, gate_st, up_st, BLOCK: tl.constexpr):
    """Grid (rows, blocks of columns); fp32 inside."""
    row, offs = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < columns
    gate = tl.load(gate_ptr + row * gate_st + offs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_st + offs, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * columns + offs, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gated_silu_backward(
    gate_ptr, up_ptr, dy_ptr, dgate_ptr, dup_ptr, columns, gate_st, up_st, dy_st, BLOCK: tl.constexpr
):
    """Grid as forward: d silu = s + x s (1 - s), s the sigmoid."""
    row, offs = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < columns
    gate = tl.load(gate_ptr + row * gate_st + offs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_st + offs, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_st + offs, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    dgate = dy * up * (s + gate * s * (1.0 - s))
    tl.store(dgate_ptr + row * columns + offs, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + row * columns + offs, (dy * gate * s).to(dup_ptr.dtype.element_ty), mask=inside)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up for [rows, columns] of one dtype, rows contiguous."""
    rows, columns = gate.shape
    out = torch.empty(rows, columns, dtype=gate.dtype, device=gate.device)
    block = min(1024, triton.next_power_of_2(columns))
    grid = (rows, triton.cdiv(columns, block))
    gated_silu_forward[grid](gate, up, out, columns, gate.stride(0), up.stride(0), BLOCK=block)
    return out


def backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dgate, dup)."""
    rows, columns = gate.shape
    dgate, dup = (torch.empty(rows, columns, dtype=x.dtype, device=x.device) for x in (gate, up))
    block = min(1024, triton.next_power_of_2(columns))
    gated_silu_backward[(rows, triton.cdiv(columns, block))](
        gate, up, dy, dgate, dup, columns, gate.stride(0), up.stride(0), dy.stride(0), BLOCK=block
    )
    return dgate, dup
