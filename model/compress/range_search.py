"""Rounding to nearest with a search for each group's range: the clip ratio of the smallest squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.quant_matmul import CanonicalWeight, WeightFormat

RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_ROWS = 1 << 22  # elements that are searched at once


def round_to(weight: Tensor, fmt: WeightFormat, ratios: tuple[float, ...] = RATIOS) -> CanonicalWeight:
    """Round a float weight [N, K] to ``fmt``; ranges that clip the largest values are tried for every group.

    The first ratio must be 1: the result's squared error is never above plain rounding's.
    """
    if fmt.is_float or fmt.block_size or len(ratios) < 2:
        return CanonicalWeight.from_float(weight, fmt)
    step = max(1, _ROWS // max(1, weight.shape[1]))
    parts = [_search(weight[at : at + step].float(), fmt, ratios) for at in range(0, len(weight), step)]
    return parts[0] if len(parts) == 1 else CanonicalWeight.cat(parts)


def _search(weight: Tensor, fmt: WeightFormat, ratios: tuple[float, ...]) -> CanonicalWeight:
    best = CanonicalWeight.from_float(weight, fmt)
    least = _errors(weight, best)
    for ratio in ratios[1:]:
        found = CanonicalWeight.from_float(_clipped(weight, fmt, ratio), fmt)
        found = _recode(weight, found)
        errors = _errors(weight, found)
        better = errors < least
        best, least = _choose(best, found, better), torch.where(better, errors, least)
    return best


def _grouped(weight: Tensor, group_size: int) -> Tensor:
    """[N, K] -> [N, groups, group_size], padded with zeros."""
    n, k = weight.shape
    groups = -(-k // group_size)
    padded = torch.zeros(n, groups * group_size)
    padded[:, :k] = weight
    return padded.view(n, groups, group_size)


def _clipped(weight: Tensor, fmt: WeightFormat, ratio: float) -> Tensor:
    """The weight with each group's extremes pulled in to ``ratio`` of its range."""
    grouped = _grouped(weight, fmt.group_size)
    if fmt.zero in ("none", "constant"):
        high = grouped.abs().amax(2, keepdim=True) * ratio
        low = -high
    else:
        low, high = grouped.amin(2, keepdim=True) * ratio, grouped.amax(2, keepdim=True) * ratio
    return grouped.clamp(low, high).reshape(len(weight), -1)[:, : weight.shape[1]]


def _recode(weight: Tensor, found: CanonicalWeight) -> CanonicalWeight:
    """Take every value's nearest code on the grids of ``found``."""
    fmt = found.format
    assert found.scale is not None
    scale = found.scale.float()[..., None]
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
    grouped = _grouped(weight, fmt.group_size)
    if fmt.zero == "minimum":
        assert found.zero is not None
        codes = (grouped - found.zero.float()[..., None]) * inverse
    elif fmt.zero == "integer":
        assert found.zero is not None
        codes = grouped * inverse + found.zero.float()[..., None]
    else:
        codes = grouped * inverse + fmt.zero_point
    top = (1 << fmt.bits) - 1
    low, high = (-(top // 2), top // 2) if fmt.zero == "none" else (0, top)
    codes = codes.round().clamp(low, high).to(found.codes.dtype)
    flat = codes.reshape(len(weight), -1)[:, : weight.shape[1]].contiguous()
    return CanonicalWeight(fmt, flat, found.scale, found.zero)


def _errors(weight: Tensor, found: CanonicalWeight) -> Tensor:
    """Squared error of every group, fp32 [N, groups]."""
    return _grouped(found.dequantize() - weight, found.format.group_size).square().sum(2)


def _choose(first: CanonicalWeight, second: CanonicalWeight, better: Tensor) -> CanonicalWeight:
    """Groups of the second where ``better`` [N, groups], else of the first."""
    assert first.scale is not None and second.scale is not None
    k, group = first.k, first.format.group_size
    spread = better.repeat_interleave(group, 1)[:, :k]
    zero = None
    if first.zero is not None and second.zero is not None:
        zero = torch.where(better, second.zero, first.zero)
    return CanonicalWeight(
        first.format,
        torch.where(spread, second.codes, first.codes),
        torch.where(better, second.scale, first.scale),
        zero,
    )
