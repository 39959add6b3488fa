"""The CPU form's tuning space: register tiles, prefetch distance, and where GEMV gives way to GEMM."""

from __future__ import annotations

from ...compiler.space import Axis, Constraint, Space
from ...compiler.target import Target
from ..shared.isa.table import TABLE
from .packing import BLOCK
from .sizes import is_integer
from .spec import QuantMatmulSpec
from .weight_format import WeightFormat

# Bytes ahead, and how near the core (3: L1, 1: L2, 0: past them), the default first. On Zen 5 L1 is best;
# on Emerald Rapids L1 has too few outstanding lines: into L2, 135M decodes 1.45x as fast, 1B 1.08x.
_DISTANCES = (4096, 0, 1024, 2048, 8192, 16384)
_DISTANCES_AMX = (16384, 8192, 4096, 2048, 32768, 0)
# On Zen 3, whose own prefetcher is good, asking for less is best: 1 KB ahead past the caches, 1.07 to 1.09x.
_DISTANCES_ZEN3 = (1024, 0, 2048, 4096, 8192, 16384)
# Of 8 bits, which are few instructions a byte, it is best not to ask at all.
_DISTANCES_ZEN3_INT8 = (0, 1024, 2048, 4096, 8192, 16384)
# And into L1 from there: spread between the loads it lets 4 bits on Emerald Rapids read at 1.0 of a bare read
# loop, where 16 KB into L2 in a burst reach 0.87.
_NEAR, _NEAR_AMX = (0, 2048), (4096, 0, 2048)
L1, L2, PAST = 3, 1, 0  # llvm.prefetch's localities
SAME = "same"  # as far ahead as other weights
# Rows of a second tile, for more rows than the small one has (0: none): it unpacks each weight once for 8
# rows, not twice for 4. On Emerald Rapids it takes 0.75 to 0.89 of the time.
_WIDE_ROWS = (8, 0)
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
    ahead = prefetch_axes(target, (GEMV, FEW), spec.weight.bits)
    small_vectors = tuple(v for v in dict.fromkeys((entry.small_vectors, 4, 2, 1)) if v <= vectors)
    wide = _WIDE_ROWS if is_integer(spec) and entry.registers > 16 and entry.lanes > 8 else (0,)
    axes = (
        Axis("small_rows", small, (FEW,)),
        Axis("wide_rows", wide, (FEW,)),
        Axis("large_rows", large, (FEW, MANY) if spec.activation != "bfloat16" else ("none",)),
        *ahead,
        Axis("gemm_from", _GEMM_FROM, (FEW,)),
        Axis("gemv_vectors", tuple(v for v in (8, 4, 2, 1) if v <= vectors), (GEMV,)),
        Axis("small_vectors", small_vectors, (FEW,)),
        Axis(
            "tile_vectors",
            (2, 1) if vectors > 1 else (1,),
            (FEW, MANY) if spec.activation != "bfloat16" else ("none",),
        ),
    )
    wider = Constraint(
        "a wider tile takes what is more than the small one's rows",
        lambda c: not c["wide_rows"] or c["wide_rows"] > c["small_rows"],
    )
    return Space(axes, (wider, *prefetch_constraints(target)))


def _is_zen3(target: Target) -> bool:
    return target.isa == "avx2" and target.mcpu == "znver3"


def prefetch_axes(target: Target, phases: tuple[str, ...], bits: int = 4) -> tuple[Axis, ...]:
    """Return how many bytes ahead weights are asked for, how near the core, and from where into L1."""
    values = {"prefetch": _DISTANCES, "prefetch_locality": (L1, L2, PAST), "prefetch_near": _NEAR}
    if _is_zen3(target):
        ahead = _DISTANCES_ZEN3_INT8 if bits == 8 else _DISTANCES_ZEN3
        values |= {"prefetch": ahead, "prefetch_locality": (PAST, L1, L2)}
    if target.isa == "amx":
        values = {
            "prefetch": _DISTANCES_AMX,
            "prefetch_locality": (L2, L1, PAST),
            "prefetch_near": _NEAR_AMX,
        }
    return tuple(Axis(name, options, phases) for name, options in values.items())


def int8_prefetch_axis(target: Target, phases: tuple[str, ...]) -> Axis:
    """Return how far ahead weights of 8 bits are asked for where others are of fewer: as those, or not."""
    return Axis("prefetch_int8", (0, SAME) if _is_zen3(target) else (SAME, 0), phases)


def prefetch_constraints(target: Target) -> tuple[Constraint, ...]:
    """Return what holds between the axes of `prefetch_axes`."""
    _, places, _ = prefetch_axes(target, ())
    return (
        Constraint(
            "without prefetch there is no place to put it",
            lambda c: bool(c["prefetch"]) or c["prefetch_locality"] == places.values[0],
        ),
        Constraint(
            "into L1 afterwards only what was asked into L2 before",
            lambda c: (
                c["prefetch_near"] == 0
                or (c["prefetch_locality"] == L2 and c["prefetch_near"] < c["prefetch"])
            ),
        ),
    )


def prefetches(target: Target) -> list[dict[str, int]]:
    """Return the ways to ask for weights ahead, the default first."""
    return list(Space(prefetch_axes(target, ()), prefetch_constraints(target)))
