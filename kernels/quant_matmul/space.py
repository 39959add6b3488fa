"""The CPU form's tuning space: register tiles, prefetch distance, and where GEMV gives way to GEMM."""

from __future__ import annotations

from dataclasses import replace

from ...compiler.space import Axis, Constraint, Space
from ...compiler.target import Target
from ..shared.isa.table import TABLE
from .packing import BLOCK
from .sizes import is_integer
from .spec import QuantMatmulSpec
from .weight_format import WeightFormat

L1, L2, PAST = 3, 1, 0  # llvm.prefetch's localities
SAME = "same"  # as far ahead as other weights
# Bytes ahead, how near the core, and from there into L1 (0: never), the default first. On Zen 5 L1 is best.
_AHEAD = ((4096, 0, 1024, 2048, 8192, 16384), (L1, L2, PAST), (0, 2048))
# On Emerald Rapids L1 has too few outstanding lines: into L2, 135M decodes 1.45x as fast, 1B 1.08x; and into
# L1 from there, spread between the loads, 4 bits read at 1.0 of a bare read loop, where bursts reach 0.87.
_AHEAD_AMX = ((16384, 8192, 4096, 2048, 32768, 0), (L2, L1, PAST), (4096, 0, 2048))
# On Zen 3, whose own prefetcher is good, asking for less is best: 1 KB ahead past the caches, 1.07 to 1.09x.
_AHEAD_ZEN3 = ((1024, 0, 2048, 4096, 8192, 16384), (PAST, L2, L1), (0, 2048))
# Of 8 bits, which are few instructions a byte, it is best not to ask at all.
_AHEAD_ZEN3_INT8 = ((0, 1024, 2048, 4096, 8192, 16384), (PAST, L2, L1), (0, 2048))
# On Zen 4 the same distance into L2 is 1.2x for one row, of 8 bits 1.3x, and a loss for several, which take
# longer over a line: there 8 KB into L2 are 1.1 to 1.2x, of 8 bits 1.5 to 2x.
_AHEAD_ZEN4 = ((1024, 0, 2048, 4096, 8192, 16384), (L2, L1, PAST), (0, 2048))
_AHEAD_ZEN4_FEW = ((8192, 4096, 16384, 2048, 1024, 0), (L2, L1, PAST), (0, 2048))
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
    small = tuple(dict.fromkeys(rows for rows, _ in entry.tiles))
    ahead = prefetch_axes(target, (GEMV,), few=False, bits=spec.weight.bits)
    few_ahead = prefetch_axes(target, (FEW,), few=True, bits=spec.weight.bits)
    small_vectors = tuple(v for v in dict.fromkeys((entry.small_vectors, 4, 2, 1)) if v <= vectors)
    wide = _WIDE_ROWS if is_integer(spec) and entry.registers > 16 and entry.lanes > 8 else (0,)
    axes = (
        Axis("small_rows", small, (FEW,)),
        Axis("wide_rows", wide, (FEW,)),
        *ahead,
        *few_ahead,
        Axis("gemm_from", _GEMM_FROM, (FEW,)),
        Axis("gemv_vectors", tuple(v for v in (8, 4, 2, 1) if v <= vectors), (GEMV,)),
        Axis("small_vectors", small_vectors, (FEW,)),
        *many_axes(target, (FEW, MANY) if spec.activation != "bfloat16" else ("none",)),
    )
    wider = Constraint(
        "a wider tile takes what is more than the small one's rows",
        lambda c: not c["wide_rows"] or c["wide_rows"] > c["small_rows"],
    )
    rules = (rule for few in (False, True) for rule in prefetch_constraints(target, few))
    return Space(axes, (wider, *rules))


def many_axes(target: Target, phases: tuple[str, ...]) -> tuple[Axis, ...]:
    """Return the rows and vectors of a tile of many rows.

    On Zen 4 8 x 1 is 1.1x: each product takes its activations from memory as it goes, and nothing spills,
    where 12 x 2 keeps its fp32 sums on the stack.
    """
    entry = TABLE[target.isa]
    rows = tuple(dict.fromkeys(large for _, large in entry.tiles))
    vectors = (2, 1) if BLOCK // entry.lanes > 1 else (1,)
    if target.mcpu == "znver4" and entry.lanes == 16:
        rows, vectors = (8, 12), (1, 2)
    return Axis("large_rows", rows, phases), Axis("tile_vectors", vectors, phases)


def _ahead(target: Target, few: bool, bits: int) -> tuple[tuple[int, ...], ...]:
    """Return the values of the axes of `prefetch_axes`, the default of each first."""
    values = _AHEAD
    if target.isa == "amx":
        values = _AHEAD_AMX
    elif target.mcpu == "znver3":
        values = _AHEAD_ZEN3_INT8 if bits == 8 else _AHEAD_ZEN3
    elif target.mcpu == "znver4":
        values = _AHEAD_ZEN4_FEW if few else _AHEAD_ZEN4
    distances, places, near = values
    return distances, tuple(place for place in places if place != PAST or not few), near


def prefetch_axes(target: Target, phases: tuple[str, ...], few: bool, bits: int = 4) -> tuple[Axis, ...]:
    """Return how many bytes ahead weights are asked for, how near the core, and from where into L1.

    With `few` by several rows, which may read a line more than once (past the caches it would come twice),
    else by one.
    """
    values = zip(prefetch_names(few), _ahead(target, few, bits))
    return tuple(Axis(name, options, phases) for name, options in values)


def prefetch_names(few: bool) -> tuple[str, str, str]:
    """Return the axes' names: distance, locality, and distance of lines that go on into L1."""
    kind = "few_prefetch" if few else "prefetch"
    return kind, f"{kind}_locality", f"{kind}_near"


def int8_prefetch_axis(target: Target, phases: tuple[str, ...]) -> Axis:
    """Return how far ahead weights of 8 bits are asked for where others are of fewer: as those, or not."""
    distance, _, _ = prefetch_axes(target, phases, few=False, bits=8)
    return Axis("prefetch_int8", (SAME, 0) if distance.values[0] else (0, SAME), phases)


def prefetch_constraints(target: Target, few: bool) -> tuple[Constraint, ...]:
    """Return what holds between the axes of `prefetch_axes`."""
    distance, place, near = prefetch_names(few)
    default = prefetch_axes(target, (), few)[1].values[0]
    return (
        Constraint(
            "without prefetch there is no place to put it",
            lambda c: bool(c[distance]) or c[place] == default,
        ),
        Constraint(
            "into L1 afterwards only what was asked into L2 before",
            lambda c: c[near] == 0 or (c[place] == L2 and c[near] < c[distance]),
        ),
    )


def prefetches(target: Target) -> list[dict[str, int]]:
    """Return the ways to ask for weights of one row ahead, the default first."""
    return list(Space(prefetch_axes(target, (), few=False), prefetch_constraints(target, few=False)))


def few_prefetch(target: Target, bits: int = 4) -> tuple[Axis, ...]:
    """Return the axes of several rows, each with its default alone."""
    axes = prefetch_axes(target, (), few=True, bits=bits)
    return tuple(replace(axis, values=axis.values[:1]) for axis in axes)
