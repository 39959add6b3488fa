"""The tuning space of embedding: empty, the layout decides all."""

from __future__ import annotations

from ...compiler.operator import single_configuration as space

__all__ = ["space"]
