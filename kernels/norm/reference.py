"""The definition of right for norm, in plain PyTorch."""

from __future__ import annotations

import torch

from .spec import NormSpec


def norm(
    spec: NormSpec, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Normalise the last dimension of x, add the residual; returns the shape of x in spec.out_dtype."""
    y = normalised(spec, x, weight, bias)
    return (y if residual is None else y + residual.float()).to(getattr(torch, spec.out_dtype))


def norm_quantized(
    spec: NormSpec, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalise, then quantise: codes int8 [..., D], scale fp32 [..., D/G], sum of codes int32 [..., D/G]."""
    return quantize(normalised(spec, x, weight, bias), spec.group_size)


def normalised(
    spec: NormSpec, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return the norm in fp32, before the one rounding to the output type."""
    x = x.float()
    if spec.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    inverse = 1.0 / torch.sqrt((x * x).mean(-1, keepdim=True) + spec.eps)
    y = (x * inverse) * (weight.float() + spec.weight_offset)
    return y if bias is None else y + bias.float()


def quantize(y: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise fp32 [..., D] symmetrically to int8 per group of the last dimension.

    absmax is the largest magnitude of a group, scale = absmax / 127, code = round_half_even(y * (127 /
    absmax)). A group whose absmax is below 2^-120 counts as zero: scale and codes are 0. A group with a
    NaN or Inf has scale NaN and codes 0, so that it is not hidden.
    """
    dim = y.shape[-1]
    groups = -(-dim // group_size)
    blocks = torch.nn.functional.pad(y, (0, groups * group_size - dim)).unflatten(-1, (groups, group_size))
    absmax = blocks.abs().amax(-1)
    finite = torch.isfinite(absmax)
    usable = finite & (absmax >= 2.0**-120)
    inverse = torch.where(usable, torch.full_like(absmax, 127.0) / absmax, 0.0)
    kept = torch.where(finite.unsqueeze(-1), blocks, 0.0)
    codes = torch.round(kept * inverse.unsqueeze(-1)).to(torch.int32)
    scale = torch.where(usable, absmax / torch.full_like(absmax, 127.0), torch.where(finite, 0.0, torch.nan))
    return codes.flatten(-2)[..., :dim].to(torch.int8), scale, codes.sum(-1, dtype=torch.int32)
