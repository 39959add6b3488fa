"""The tuning space of sampling: empty; a tuned choice must not change a token."""

from __future__ import annotations

from ...compiler.operator import single_configuration as space

__all__ = ["space"]
