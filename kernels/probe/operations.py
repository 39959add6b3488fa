"""The sizes of the probes' loops, and what they compute. Needs no TVM."""

from __future__ import annotations

from ..shared.isa.table import TABLE

LINE_BYTES = 64 * 8  # bytes that one step of the read loop takes
PIECE_LINES, PIECES = 2048, 16  # what a thread of the read loop takes: 1 MiB, or one of so many parts
TILE_VECTORS = 2
L1_STEPS = 16  # the operands of so many steps lie in L1


def dot_operations(isa_name: str, rounds: int) -> int:
    """Return the operations (multiplications and additions) of one thread's `rounds`."""
    isa = TABLE[isa_name]
    return rounds * L1_STEPS * isa.gemm_rows * TILE_VECTORS * isa.lanes * 4 * 2


MATRIX_STEPS = 8  # four tiles of 1 KiB each: the operands lie in L1
TILE_STATE_BYTES = 8 << 10


def matrix_operations(rounds: int) -> int:
    """Return the bf16 operations of one thread's `rounds` on a matrix unit."""
    return rounds * MATRIX_STEPS * 4 * 16 * 16 * 32 * 2


def multiply_add_operations(isa_name: str, rounds: int) -> int:
    """Return the fp32 operations of one thread's `rounds`."""
    return dot_operations(isa_name, rounds) // 4
