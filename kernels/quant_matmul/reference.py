"""The definition of right for the quantised matmul, in plain PyTorch."""

from __future__ import annotations

import torch
from torch.nn.functional import gelu, silu

from .spec import SMALLEST, QuantMatmulSpec
from .weight_format import CanonicalWeight


def quantize_activations(
    x: torch.Tensor, group_size: int, groups: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes [M, groups, group_size] (zero padded) and fp32 scales [M, groups] of x [M, K].

    A group with NaN or Inf gets a NaN scale, so that its whole row is NaN; one whose absolute maximum is
    below SMALLEST counts as zero.
    """
    m, k = x.shape
    groups = groups or -(-k // group_size)
    padded = torch.zeros(m, groups * group_size)
    padded[:, :k] = x.float()
    v = padded.view(m, groups, group_size)
    largest = v.abs().amax(2)
    # A division of two tensors: torch computes `127 / tensor` by a reciprocal, which rounds twice.
    inverse = torch.where(largest >= SMALLEST, torch.full_like(largest, 127) / largest, 0)
    codes = (v * inverse.unsqueeze(2)).nan_to_num(0.0).round().clamp(-127, 127)
    scales = torch.where(largest < SMALLEST, 0, largest / 127)
    return codes.to(torch.int8), torch.where(largest.isfinite(), scales, torch.nan)


def quant_matmul(
    spec: QuantMatmulSpec,
    x: torch.Tensor,
    weight: CanonicalWeight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return epilogue(x @ W.T + bias) + residual for x [M, K]; accumulated in fp64 over exact group sums."""
    fmt = weight.format
    if spec.activation == "bfloat16":
        y = x.bfloat16().double() @ weight.dequantize().bfloat16().double().T
    elif spec.activation == "float" or fmt.is_float:
        y = x.double() @ weight.dequantize().double().T
    else:
        codes, scales = quantize_activations(x, fmt.group_size, fmt.groups(weight.k))
        _, groups, size = codes.shape
        w = torch.zeros(weight.n, groups * size, dtype=torch.float64)
        w[:, : weight.k] = weight.codes.double() - fmt.zero_point
        w = w.view(weight.n, groups, size)
        dots = torch.einsum("mgk,ngk->mng", codes.double(), w)  # exact: integers below 2**53
        s = weight.group_scales().double()
        if fmt.zero == "integer":
            dots = dots - codes.double().sum(2)[:, None, :] * weight.group_minima().double()
        y = torch.einsum("mng,ng,mg->mn", dots, s, scales.double())
        if fmt.zero == "minimum":
            minima = weight.group_minima().double()
            y = y + torch.einsum("mg,ng->mn", codes.double().sum(2) * scales.double(), minima)
    if bias is not None:
        y = y + bias.double()
    if spec.pair:
        gate, up = y.chunk(2, 1)
        y = (silu(gate) if spec.epilogue == "silu_pair" else gelu(gate, approximate="tanh")) * up
    if spec.softcap:
        y = spec.softcap * torch.tanh(y / spec.softcap)
    if residual is not None:
        y = y + residual.double()
    return y.to(x.dtype)
