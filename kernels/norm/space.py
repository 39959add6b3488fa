"""The tuning space of norm: how many vectors are summed side by side."""

from __future__ import annotations

from typing import Any

from ...compiler.target import Target
from ..shared.isa.table import TABLE
from .spec import NormSpec

ACCUMULATORS = (4, 1, 2, 8)  # the default first


def space(spec: NormSpec, target: Target) -> list[dict[str, Any]]:
    """Return the configurations whose step fits a row, the default first; 1 always fits."""
    lanes = TABLE[target.isa].lanes
    fitting = [a for a in ACCUMULATORS if a == 1 or a * lanes <= spec.dim]
    return [{"accumulators": a} for a in fitting]
