"""The tuning space of rope: empty, the vector width decides all."""

from __future__ import annotations

from ...compiler.operator import single_configuration as space

__all__ = ["space"]
