"""Sizes of the CPU form's scratch memory: what the kernels use and the caller allocates. Needs no TVM."""

from __future__ import annotations

from dataclasses import dataclass

from ..shared.isa.table import TABLE
from .packing import BLOCK
from .spec import QuantMatmulSpec

TILE = 16  # rows and columns of a matrix unit's tile; 2 x TILE values of K
TILE_STATE_BYTES = 8 << 10  # what a thread keeps of its tiles in memory (see shared/isa)


def uses_matrix(spec: QuantMatmulSpec) -> bool:
    """Whether the products are a matrix unit's."""
    return spec.activation == "bfloat16"


@dataclass(frozen=True)
class MatrixPlan:
    """How a matrix unit's product is cut: values of K a slice; units and tiles of 32 rows that share one."""

    depth: int
    units: int
    row_tiles: int


_MOST_DEPTH = 640  # a panel of 32 columns is 40 KiB then, and stays in an L1 of 48


def matrix_plan(spec: QuantMatmulSpec) -> MatrixPlan:
    """Return the cut: K in even slices whose panel stays in L1 while the rows pass.

    Of 512 rows a slice of x (up to 640 KiB) and the sums of 8 panels (512 KiB) lie in L2.
    """
    k, step = padded_k(spec), max(2 * TILE, spec.weight.group_size)
    if k <= _MOST_DEPTH:
        return MatrixPlan(k, 1, 1)
    slices = -(-k // (_MOST_DEPTH // step * step))
    depth = -(-k // (slices * step)) * step
    parts = 2 if spec.pair else 1
    blocks = -(-spec.n // (parts * BLOCK))
    return MatrixPlan(depth, max(1, min(8 // parts, blocks // 8)), 16)


def is_integer(spec: QuantMatmulSpec) -> bool:
    """Whether the products are integer."""
    return spec.activation == "int8" and not spec.weight.is_float


def uses_pairs(spec: QuantMatmulSpec, isa: str) -> bool:
    """Whether the panel of large M, and its activations, are int16 pairs."""
    return is_integer(spec) and spec.weight.bits == 8 and TABLE[isa].pairs


def uses_squares(spec: QuantMatmulSpec, isa: str) -> bool:
    """Whether the panel of large M is [K/8][32][8], and its activations pairs of rows by 8 values."""
    return is_integer(spec) and TABLE[isa].squares


def padded_k(spec: QuantMatmulSpec) -> int:
    """Return K of the scratch rows: whole groups (of float weights, whole tiles or vectors)."""
    if spec.weight.is_float:
        step = 2 * TILE if uses_matrix(spec) else TILE
        return -(-spec.k // step) * step
    return spec.weight.groups(spec.k) * spec.weight.group_size


def element_bytes(spec: QuantMatmulSpec, isa: str) -> int:
    """Return the bytes of one element of the panel, and of a row prepared for it."""
    if uses_matrix(spec):
        return 2
    if not is_integer(spec):
        return 4
    return 2 if uses_pairs(spec, isa) else 1


def panel_bytes(spec: QuantMatmulSpec, isa: str) -> int:
    """Return the bytes of one thread's panels: one, or a gate and up pair."""
    parts = 2 if spec.pair else 1
    if uses_matrix(spec):  # and the fp32 sums
        plan = matrix_plan(spec)
        sums = plan.units * parts * plan.row_tiles if plan.depth < padded_k(spec) else 1
        return plan.depth * BLOCK * 2 + sums * BLOCK * BLOCK * 4 + TILE_STATE_BYTES
    return parts * line(padded_k(spec) * BLOCK * element_bytes(spec, isa))


def line(nbytes: int) -> int:
    """Return a size rounded up to whole cache lines."""
    return -(-nbytes // 64) * 64
