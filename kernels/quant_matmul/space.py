"""The CPU form's tuning space: register tiles, prefetch distance, and where GEMV gives way to GEMM."""

from __future__ import annotations

from ...compiler.space import Axis, Constraint, Space
from ...compiler.target import Target
from ..shared.isa.table import TABLE
from .packing import BLOCK
from .spec import QuantMatmulSpec
from .weight_format import WeightFormat

# Bytes ahead, and how near the core (3: L1, 1: L2, 0: past them), the default first. On Zen 5 L1 is best;
# on Emerald Rapids L1 has too few outstanding lines: into L2, 135M decodes 1.45x as fast, 1B 1.08x.
_DISTANCES = (4096, 0, 1024, 2048, 8192, 16384)
_DISTANCES_AMX = (16384, 8192, 4096, 2048, 32768, 0)
_GEMM_FROM = (16, 8, 32)
GEMV, FEW, MANY = "gemv", "few", "many"  # phases: one row, fewer rows than any switch to panels, more


_MATRIX_FROM = 9  # rows from which a tile of 16 bf16 rows beats int8 dot products


def fastest_activation(rows: int, weight: WeightFormat, target: Target) -> str:
    """Return the activation type that "auto" stands for: bf16 where a matrix unit multiplies many rows.

    bf16 rounds less than int8 codes do. Weights of more than 8 significant bits keep float activations.
    """
    if target.isa == "amx" and rows >= _MATRIX_FROM and (weight.dtype == "bfloat16" or not weight.is_float):
        return "bfloat16"
    return "float" if weight.is_float else "int8"


def space(spec: QuantMatmulSpec, target: Target) -> Space:
    """Return the configurations of this problem on this target, the default first."""
    entry = TABLE[target.isa]
    vectors = BLOCK // entry.lanes
    small, large = (tuple(dict.fromkeys(rows)) for rows in zip(*entry.tiles))
    distances, places = prefetch_values(target)
    axes = (
        Axis("small_rows", small, (FEW,)),
        Axis("large_rows", large, (FEW, MANY) if spec.activation != "bfloat16" else ("none",)),
        Axis("prefetch", distances, (GEMV, FEW)),
        Axis("prefetch_locality", places, (GEMV, FEW)),
        Axis("gemm_from", _GEMM_FROM, (FEW,)),
        Axis("gemv_vectors", tuple(v for v in (8, 4, 2, 1) if v <= vectors), (GEMV,)),
        Axis(
            "tile_vectors",
            (2, 1) if vectors > 1 else (1,),
            (FEW, MANY) if spec.activation != "bfloat16" else ("none",),
        ),
    )
    constraint = Constraint(
        "without prefetch there is no place to put it",
        lambda c: bool(c["prefetch"]) or c["prefetch_locality"] == places[0],
    )
    return Space(axes, (constraint,))


def prefetch_values(target: Target) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return how many bytes ahead weights are asked for and how near the core, the defaults first."""
    return (_DISTANCES_AMX, (1, 3, 0)) if target.isa == "amx" else (_DISTANCES, (3, 1, 0))


def prefetches(target: Target) -> list[dict[str, int]]:
    """Return the ways to ask for weights ahead, the default first."""
    distances, places = prefetch_values(target)
    return [{"prefetch": d, "prefetch_locality": p} for p in places for d in distances if d or p == places[0]]
