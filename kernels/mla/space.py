"""The CPU form's tuning space: that of its inner attention."""

from __future__ import annotations

from ...compiler.space import Space
from ...compiler.target import Target
from ..attention.space import space as attention_space
from .spec import MlaSpec


def space(spec: MlaSpec, target: Target) -> Space:
    """Return every configuration, the default first."""
    return attention_space(spec.inner(), target)
