"""Gradients of ops on packed weights: the weight is dequantised block by block, never as a whole."""

from __future__ import annotations

from typing import Any

import torch

from ..compiler.errors import UnsupportedError
from ..kernels.quant_matmul import PackedWeight
from . import ops

_ROWS = 1024  # rows of W that are dequantised at a time


def quant_matmul(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    epilogue: str,
    activation: str,
    form: str | None,
) -> torch.Tensor:
    """`ops.quant_matmul` under autograd: gradients for x, bias and residual, straight through rounding."""
    if epilogue != "none":
        raise UnsupportedError(
            "the gated epilogue has no gradient; call the product without it and gate in PyTorch"
        )
    if residual is not None and (residual.dtype != x.dtype or residual.shape != (*x.shape[:-1], weight.n)):
        raise UnsupportedError(
            f"residual is {tuple(residual.shape)} {residual.dtype}, not {(*x.shape[:-1], weight.n)} {x.dtype}"
        )
    y: torch.Tensor = _QuantMatmul.apply(x, weight, bias, activation, form)  # pyright: ignore
    return y if residual is None else y + residual


class _QuantMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: PackedWeight,
        bias: torch.Tensor | None,
        activation: str,
        form: str | None,
    ) -> torch.Tensor:
        ctx.weight, ctx.has_bias = weight, bias is not None
        with torch.no_grad():
            return ops.quant_matmul(
                x.detach(),
                weight,
                bias=None if bias is None else bias.detach(),
                activation=activation,
                form=form,
            )

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # pyright: ignore
        flat = grad.reshape(-1, grad.shape[-1]).float()
        grad_x = None
        if ctx.needs_input_grad[0]:
            canonical = ctx.weight.unpack()
            grad_x = torch.zeros(flat.shape[0], canonical.k)
            for start in range(0, canonical.n, _ROWS):
                block = canonical.slice_rows(start, min(start + _ROWS, canonical.n)).dequantize()
                grad_x += flat[:, start : start + _ROWS] @ block
            grad_x = grad_x.view(*grad.shape[:-1], canonical.k).to(grad.dtype)
        grad_bias = flat.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, None, None
