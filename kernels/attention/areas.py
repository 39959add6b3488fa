"""Scratch memory of the CPU form: what each thread keeps where. Needs no TVM: the caller allocates it."""

from __future__ import annotations

from collections.abc import Sequence

from ..shared.isa.table import TABLE
from .spec import AttentionSpec


def decode_offsets(spec: AttentionSpec, max_chunk: int) -> list[int]:
    """Return where a thread's areas start, in bytes, then their size: q, scores, out, bias, scales."""
    bias = max_chunk if spec.mask == "additive" else 0
    scales = 2 * max_chunk if spec.kv_dtype == "int8" else 0
    rows = [spec.group * size for size in (spec.head_dim, max_chunk, spec.v_head_dim)]
    return _offsets((*rows, bias, scales))


def decode_area(spec: AttentionSpec, max_chunk: int) -> int:
    """Return the bytes of one thread's areas in decode."""
    return decode_offsets(spec, max_chunk)[-1]


def partial_bytes(spec: AttentionSpec, rows: int, chunks: int) -> int:
    """Return the bytes of decode's partial results: `rows` (batch x heads x queries) in `chunks`."""
    return 4 * rows * chunks * (spec.v_head_dim + 2) + 192


def decode_chunk(tk: int, most: int) -> int:
    """Return the keys of a chunk: it depends on the context alone, so results do not change with threads."""
    for limit, chunk in ((512, 64), (2048, 128)):
        if tk <= limit:
            return min(chunk, most)
    return most


def prefill_offsets(spec: AttentionSpec, step: int, block_q: int, block_k: int) -> list[int]:
    """Return where a thread's areas start, in bytes, then their size.

    Areas: q, out, m, l (rows), K panels, V, scores and bias (one row block), bounds and decay of its rows.
    """
    rows = -(-max(block_q, spec.group) // step) * step + step
    bias = step * block_k if spec.mask == "additive" else 0
    tiles = [rows * spec.head_dim, rows * spec.v_head_dim, rows, rows]
    tiles += [block_k * spec.head_dim, block_k * spec.v_head_dim, step * block_k, bias]
    return _offsets((*tiles, 2 * step, step))


MATRIX_ROWS = 32  # query rows of a step on a matrix unit: two tiles
MATRIX_PANEL = 32  # keys of a step: two tiles of scores, one of weights
_TILE_STATE_BYTES = 8 << 10  # what a thread keeps of its tiles in memory (see shared/isa)


def prefill_area(spec: AttentionSpec, isa: str, block_q: int, block_k: int) -> int:
    """Return the bytes of one thread's areas in prefill."""
    block_k = whole_block_k(block_k)
    if spec.math == "bfloat16":
        return matrix_offsets(spec, block_q, block_k)[-1]
    return prefill_offsets(spec, TABLE[isa].gemm_rows, block_q, block_k)[-1]


def matrix_offsets(spec: AttentionSpec, block_q: int, block_k: int) -> list[int]:
    """Return where a thread's areas start on a matrix unit, in bytes, then their size.

    Areas: q tiles, out, m, l (rows), K tiles, V tiles, scores (or 32 rows of out), weight tiles, bounds,
    state of the unit.
    """
    rows = -(-max(block_q, spec.group) // MATRIX_ROWS) * MATRIX_ROWS
    depth = -(-spec.head_dim // 32) * 32
    sizes = [rows * depth // 2, rows * spec.v_head_dim, rows, rows]
    sizes += [block_k * depth // 2, block_k * spec.v_head_dim // 2]
    sizes += [MATRIX_ROWS * max(block_k, spec.v_head_dim), MATRIX_ROWS * block_k // 2, 2 * MATRIX_ROWS]
    return _offsets((*sizes, _TILE_STATE_BYTES // 4))


def whole_block_k(block_k: int) -> int:
    """Round a tile's keys up to whole panels of every instruction set."""
    return -(-block_k // 32) * 32


def _offsets(elements: Sequence[int]) -> list[int]:
    """Return byte offsets of fp32 areas, each on its own cache lines, and the total."""
    offsets, at = [], 0
    for count in elements:
        offsets.append(at)
        at += -(-4 * count // 64) * 64
    return [*offsets, at]
