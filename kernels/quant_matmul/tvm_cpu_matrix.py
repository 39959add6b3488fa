"""The CPU form on a bf16 matrix unit: rows and unpacked blocks in tiles, four accumulators, any M.

Rows of x are rounded once to bf16 tiles [M/16][K/32][16][32]. A thread unpacks a block of 32 columns to
tiles [K/32][2][16][16][2] and multiplies it with every 32 rows; the fp32 results pass the epilogue in L1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..shared import tir
from ..shared.claim import claimed
from ..shared.isa.table import Isa
from ..shared.tir import T
from .packing import BLOCK
from .sizes import TILE, panel_bytes
from .tvm_cpu_context import Context, finish_vector, finished, row_tiles, stream_of, units
from .tvm_cpu_tiles import Stream, float_element, float_weights

ROWS = 2 * TILE  # rows of x that pass a block together
DEPTH = 2 * TILE  # values of K in a tile
TILE_BYTES = 64 * TILE
_RESULT_BYTES = ROWS * BLOCK * 4


def matrix_share(c: Context, thread: Any) -> None:
    """Emit one thread's work on rounded rows: blocks as they come, each unpacked once for all rows."""
    kernel, spec, tiles = c.kernel, c.spec, row_tiles(c)
    parts = 2 if spec.epilogue == "silu_pair" else 1
    panel = c.k_padded * BLOCK * 2
    area = tir.let(kernel["panel"] + thread * panel_bytes(spec, c.isa.name))
    results = tir.let(area + parts * panel)
    c.isa.matrix.configure(tir.let(results + parts * _RESULT_BYTES))
    with claimed(kernel["counter"], T.int64(units(c))) as unit:
        for part in range(parts):
            fill_panel(stream_of(c, unit * parts + part), tir.let(area + part * panel), c.k_padded)
        with tir.loop(tiles) as t:
            row0 = tir.let(t * ROWS)
            rows = tir.let(T.min(kernel["m"] - row0, T.int64(ROWS)))
            for part in range(parts):
                at = (area + part * panel, results + part * _RESULT_BYTES)
                with tir.when(rows > TILE):
                    _multiply(c, t, *at, row_tiles=2)
                with tir.when(rows <= TILE):
                    _multiply(c, t, *at, row_tiles=1)
            _finish(c, unit, row0, rows, results, parts)
    c.isa.matrix.release()


def round_row(c: Context, row: Any, x_at: Any = None) -> None:
    """Emit: row `row` of x to its places in the bf16 tiles; zeros past M and K.

    The row is read at element `x_at` of x, if that is not row * K.
    """
    k, spec = c.kernel, c.spec
    x_at = row * spec.k if x_at is None else x_at
    out = tir.buffer_at(k["codes"], "uint16")
    blocks, whole = c.k_padded // DEPTH, spec.k // DEPTH
    first = tile_row(row, c.k_padded)
    zeros = tir.splat(T.uint16(0), DEPTH)
    with tir.when(row < k["m"]):
        with tir.loop(whole) as block:
            at = tir.let(x_at + block * DEPTH)
            low, high = (tir.let(tir.to_f32(k["x"], at + half * TILE, TILE)) for half in range(2))
            tir.store(out, first + block * (DEPTH * TILE), c.isa.matrix.to_bf16(low, high))
        for block in range(whole, blocks):
            tir.store(out, first + block * (DEPTH * TILE), zeros)
        with tir.loop(spec.k - whole * DEPTH) as i:
            value = tir.to_f32(k["x"], x_at + whole * DEPTH + i, 1)
            tir.store(out, first + whole * (DEPTH * TILE) + i, tir.bf16_bits(value))
    with tir.when(row >= k["m"]), tir.loop(blocks) as block:
        tir.store(out, first + block * (DEPTH * TILE), zeros)


def tile_row(row: Any, k_padded: int) -> Any:
    """Return where a row's first 32 values stand in the bf16 tiles; the next 32 are 512 elements on."""
    tile = T.truncdiv(row, T.int64(TILE)) * (k_padded // DEPTH * TILE)
    return tir.let((tile + T.truncmod(row, T.int64(TILE))) * DEPTH)


def tile_sink(isa: Isa, tiles: Any, k_padded: int) -> Callable[[Any, Any, list[Any]], None]:
    """Return a sink (see Context) that rounds results to the tiles of the next product, at address `tiles`."""

    def store(row: Any, column: Any, values: list[Any]) -> None:
        at = tile_row(row, k_padded) + T.truncdiv(column, T.int64(DEPTH)) * (DEPTH * TILE)
        tir.store(tir.buffer_at(tiles, "uint16"), at, isa.matrix.to_bf16(*values))

    return store


def fill_panel(stream: Stream, panel: Any, k_padded: int) -> None:
    """Emit: unpack one block to bf16 tiles at address `panel`."""
    spec, g = stream.spec, stream.geometry
    out = tir.buffer_at(panel, "uint16")
    if spec.weight.is_float:
        with tir.loop(spec.k // 2) as pair:
            for half in range(2):
                values = [tir.let(float_element(stream, pair * 2 + j, half)) for j in range(2)]
                _store_pair(stream.isa, out, pair, half, *values)
        for pair in range(spec.k // 2, k_padded // 2):
            for half in range(2):
                last = tir.let(float_element(stream, T.int64(spec.k - 1), half))
                zero = tir.f32(0.0, TILE)
                odd_one = pair * 2 < spec.k
                _store_pair(stream.isa, out, T.int64(pair), half, last if odd_one else zero, zero)
        return
    run = 4 * g.planes
    with tir.loop(g.groups) as group, tir.loop(spec.weight.group_size // run) as step:
        for half in range(2):
            values = float_weights(stream, group, step, half)
            first = tir.let((group * spec.weight.group_size + step * run) // 2)
            for i in range(run // 2):
                _store_pair(stream.isa, out, first + i, half, values[2 * i], values[2 * i + 1])


def _store_pair(isa: Isa, out: Any, pair: Any, half: int, low: Any, high: Any) -> None:
    """Emit: rows 2 * pair (low) and 2 * pair + 1 (high) of 16 columns, side by side."""
    block, inside = T.truncdiv(pair, T.int64(TILE)), T.truncmod(pair, T.int64(TILE))
    both = tir.Register("uint16", DEPTH)
    both.set(isa.matrix.to_bf16(low, high))
    order = [T.int32(i // 2 + (i % 2) * TILE) for i in range(DEPTH)]
    tir.store(out, ((block * 2 + half) * TILE + inside) * DEPTH, T.Shuffle([both.get()], order))


def _multiply(c: Context, t: Any, panel: Any, result: Any, row_tiles: int) -> None:
    """Emit: 16 or 32 rows times the panel, over all of K, to fp32 [32][32] at address `result`."""
    unit, blocks = c.isa.matrix, c.k_padded // DEPTH
    rows_at = tir.let(c.kernel["codes"] + t * (2 * blocks * TILE_BYTES))
    for tile in range(2 * row_tiles):
        unit.zero(tile)
    with tir.loop(blocks) as block:
        right = tir.let(panel + block * (2 * TILE_BYTES))
        for half in range(2):
            unit.load(6 + half, right + half * TILE_BYTES)
        for r in range(row_tiles):
            unit.load(4 + r, tir.let(rows_at + r * (blocks * TILE_BYTES) + block * TILE_BYTES))
        for r in range(row_tiles):
            for half in range(2):
                unit.multiply(2 * r + half, 4 + r, 6 + half)
    for r in range(row_tiles):
        for half in range(2):
            unit.store(2 * r + half, result + (r * TILE * BLOCK + half * TILE) * 4, BLOCK * 4)


def _finish(c: Context, unit: Any, row0: Any, rows: Any, results: Any, parts: int) -> None:
    values = [tir.buffer_at(tir.let(results + part * _RESULT_BYTES), "float32") for part in range(parts)]
    with tir.loop(rows) as r:
        row = tir.let(row0 + r)
        done = []
        for half in range(2):
            at = tir.let(unit * BLOCK + half * TILE)
            held = [tir.let(tir.load(v, r * BLOCK + half * TILE, TILE)) for v in values]
            second = held[1] if parts == 2 else None
            if c.sink is None:
                finish_vector(c, row, at, held[0], second)
            else:
                done.append(tir.let(finished(c, row, at, TILE, held[0], second)))
        if c.sink is not None:
            c.sink(row, unit * BLOCK, done)
