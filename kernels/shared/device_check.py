"""How a form on a device is held to its reference, on the device at hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def difference(got: Tensor, wanted: Tensor) -> float:
    """Return the relative L2 difference; infinite where only one is finite."""
    got, wanted = got.double().flatten(), wanted.double().flatten()
    if not torch.equal(got.isfinite(), wanted.isfinite()):
        return math.inf
    got, wanted = got[wanted.isfinite()], wanted[wanted.isfinite()]
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-30))


def wrong(got: Tensor, wanted: Tensor, tolerance: float, what: str) -> str:
    """Return "" when two results agree, else what differs and by how much."""
    found = difference(got, wanted)
    return "" if found <= tolerance else f"{what} differs by {found:.3g} (allowed {tolerance:g})"


def random_tensors(seed: int, *shapes: Sequence[int]) -> list[Tensor]:
    """Return normal random fp32 tensors, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]
