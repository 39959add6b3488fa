"""The CPU form's tuning space: register tiles, prefetch distance, and where GEMV gives way to GEMM."""

from __future__ import annotations

import itertools
from typing import Any

from ...compiler.target import Target
from .spec import QuantMatmulSpec

# (small rows, large rows) that fit the register file, the default first.
_TILES = {
    "amx": [(4, 12), (4, 8), (8, 12)],
    "avx512_vnni": [(4, 12), (4, 8), (8, 12)],
    "avx2": [(4, 4), (4, 6), (2, 4), (2, 6)],
    "portable": [(2, 4), (1, 2)],
    "portable16": [(4, 12)],
}
_PREFETCH = [4096, 0, 1024, 2048, 8192, 16384]
_GEMM_FROM = [16, 8, 32]


def space(spec: QuantMatmulSpec, target: Target) -> list[dict[str, Any]]:
    """Return every configuration, the default first."""
    tiles = _TILES[target.isa]
    return [
        {"small_rows": small, "large_rows": large, "prefetch": prefetch, "gemm_from": switch}
        for (small, large), prefetch, switch in itertools.product(tiles, _PREFETCH, _GEMM_FROM)
    ]
