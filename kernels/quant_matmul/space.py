"""The CPU form's tuning space: register tiles, prefetch distance, and where GEMV gives way to GEMM."""

from __future__ import annotations

import itertools
from typing import Any

from ...compiler.target import Target
from ..shared.isa.table import TABLE
from .spec import QuantMatmulSpec
from .weight_format import WeightFormat

# Bytes ahead, and how near the core (3: L1, 1: L2), the default first. On Zen 5 L1 is best; on Emerald Rapids
# L1 has too few outstanding lines: into L2, 135M decodes 1.45x as fast, 1B 1.08x.
_PREFETCH = [(4096, 3), (0, 3), (1024, 3), (2048, 3), (8192, 3), (16384, 3), (8192, 1), (16384, 1)]
_PREFETCH_AMX = [(16384, 1), (8192, 1), (4096, 1), (4096, 3), (8192, 3), (0, 3)]
_GEMM_FROM = [16, 8, 32]


_MATRIX_FROM = 9  # rows from which a tile of 16 bf16 rows beats int8 dot products


def fastest_activation(rows: int, weight: WeightFormat, target: Target) -> str:
    """Return the activation type that "auto" stands for: bf16 where a matrix unit multiplies many rows.

    bf16 rounds less than int8 codes do. Weights of more than 8 significant bits keep float activations.
    """
    if target.isa == "amx" and rows >= _MATRIX_FROM and (weight.dtype == "bfloat16" or not weight.is_float):
        return "bfloat16"
    return "float" if weight.is_float else "int8"


def space(spec: QuantMatmulSpec, target: Target) -> list[dict[str, Any]]:
    """Return every configuration, the default first."""
    tiles = TABLE[target.isa].tiles
    return [
        {"small_rows": small, "large_rows": large, **prefetch, "gemm_from": switch}
        for (small, large), prefetch, switch in itertools.product(tiles, prefetches(target), _GEMM_FROM)
    ]


def prefetches(target: Target) -> list[dict[str, int]]:
    """Return the ways to ask for weights ahead, the default first."""
    found = _PREFETCH_AMX if target.isa == "amx" else _PREFETCH
    return [{"prefetch": distance, "prefetch_locality": locality} for distance, locality in found]
