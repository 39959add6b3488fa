"""The CPU form's tuning space: rows of a tile, prefetch, and the density from which all blocks are read."""

from __future__ import annotations

import itertools
from typing import Any

from ...compiler.target import Target
from ..quant_matmul.space import few_prefetch, prefetches
from ..shared.isa.table import TABLE
from .spec import SparseMlpSpec

_DENSE_FROM = (80, 90, 100)  # percent of the blocks, the default first


def space(spec: SparseMlpSpec, target: Target) -> list[dict[str, Any]]:
    """Return every configuration, the default first."""
    rows = dict.fromkeys(small for small, _ in TABLE[target.isa].tiles)
    few = {axis.name: axis.values[0] for axis in few_prefetch(target)}
    return [
        {"small_rows": small, **prefetch, **few, "dense_from": dense}
        for small, prefetch, dense in itertools.product(rows, prefetches(target), _DENSE_FROM)
    ]
