"""Sizes of the CPU form's scratch memory: what the kernels use and the caller allocates. Needs no TVM."""

from __future__ import annotations

from ..shared.isa.table import INT8_CODES
from .packing import BLOCK
from .spec import QuantMatmulSpec

TILE = 16  # rows and columns of a matrix unit's tile; 2 x TILE values of K
TILE_STATE_BYTES = 8 << 10  # what a thread keeps of its tiles in memory (see shared/isa)


def uses_matrix(spec: QuantMatmulSpec) -> bool:
    """Whether the products are a matrix unit's."""
    return spec.activation == "bfloat16"


def is_integer(spec: QuantMatmulSpec) -> bool:
    """Whether the products are integer."""
    return spec.activation == "int8" and not spec.weight.is_float


def uses_pairs(spec: QuantMatmulSpec, isa: str) -> bool:
    """Whether the panel of large M, and its activations, are int16 pairs."""
    return is_integer(spec) and spec.weight.bits == 8 and INT8_CODES[isa] == "signed"


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
    parts = 2 if spec.epilogue == "silu_pair" else 1
    if uses_matrix(spec):  # and the fp32 tiles of a row block
        return parts * (padded_k(spec) * BLOCK * 2 + BLOCK * BLOCK * 4) + TILE_STATE_BYTES
    return parts * line(padded_k(spec) * BLOCK * element_bytes(spec, isa))


def line(nbytes: int) -> int:
    """Return a size rounded up to whole cache lines."""
    return -(-nbytes // 64) * 64
