"""The CPU form on a bf16 matrix unit: rows and unpacked blocks in tiles, four accumulators, any M.

Rows of x are rounded once to bf16 tiles [M/16][K/32][16][32]. A thread unpacks a block of 32 columns to
tiles [K/32][2][16][16][2] and multiplies it with every 32 rows; the fp32 results pass the epilogue in L1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..shared import tir
from ..shared.claim import claimed
from ..shared.isa.table import Isa
from ..shared.tir import T
from .packing import BLOCK
from .sizes import TILE, TILE_STATE_BYTES, MatrixPlan, matrix_plan, panel_bytes
from .tvm_cpu_context import Context, finish_vector, finished, row_tiles, stream_of, units
from .tvm_cpu_stream import Stream, float_element, float_weights, group_values

ROWS = 2 * TILE  # rows of x that pass a block together
DEPTH = 2 * TILE  # values of K in a tile
TILE_BYTES = 64 * TILE
_RESULT_BYTES = ROWS * BLOCK * 4


def matrix_share(c: Context, thread: Any) -> None:
    """Emit one thread's work on rounded rows: blocks as they come, each unpacked once for all rows."""
    area = tir.let(c.kernel["panel"] + thread * panel_bytes(c.spec, c.isa.name))
    c.isa.matrix.configure(area)
    area = tir.let(area + TILE_STATE_BYTES)
    plan = matrix_plan(c.spec)
    if plan.depth < c.k_padded:
        _deep_share(c, area, plan)
    else:
        _flat_share(c, area)
    c.isa.matrix.release()


def _flat_share(c: Context, area: Any) -> None:
    """K fits: a panel in L1, the rows pass by."""
    results = tir.let(area + c.k_padded * BLOCK * 2)
    blocks = (T.int64(0), T.int64(c.k_padded // DEPTH))
    with claimed(c.kernel["counter"], T.int64(units(c))) as unit:
        for columns in _panels(c, unit):
            fill_panel(columns.sources, area, T.int64(0), T.int64(c.k_padded))
            with tir.loop(row_tiles(c)) as t:
                row0 = tir.let(t * ROWS)
                rows = tir.let(T.min(c.kernel["m"] - row0, T.int64(ROWS)))
                _multiply(c, t, rows, area, results, blocks, None)
                _finish(c, columns, row0, rows, results)


def _deep_share(c: Context, area: Any, plan: MatrixPlan) -> None:
    """K in slices: of some rows and a slice, x stays in L2 for several panels, whose sums lie beside it."""
    kernel, total, slices = c.kernel, units(c), -(-c.k_padded // plan.depth)
    tiles, count_of = row_tiles(c), 2 if c.spec.pair else 1
    results = tir.let(area + plan.depth * BLOCK * 2)
    sums_bytes = plan.row_tiles * _RESULT_BYTES
    with claimed(kernel["counter"], T.int64(-(-total // plan.units))) as some:
        first = tir.let(some * plan.units)
        count = tir.let(T.min(T.int64(plan.units), total - first))
        with tir.loop(T.truncdiv(tiles + (plan.row_tiles - 1), T.int64(plan.row_tiles))) as band:
            t0 = tir.let(band * plan.row_tiles)
            here = tir.let(T.min(T.int64(plan.row_tiles), tiles - t0))

            def rows_of(t: Any, t0: Any = t0) -> tuple[Any, Any]:
                row0 = tir.let((t0 + t) * ROWS)
                return row0, tir.let(T.min(kernel["m"] - row0, T.int64(ROWS)))

            with tir.loop(slices) as cut:
                start = tir.let(cut * plan.depth)
                stop = tir.let(T.min(start + plan.depth, T.int64(c.k_padded)))
                blocks = (T.truncdiv(start, T.int64(DEPTH)), T.truncdiv(stop - start, T.int64(DEPTH)))
                with tir.loop(count) as u:
                    for i, columns in enumerate(_panels(c, tir.let(first + u))):
                        fill_panel(columns.sources, area, start, stop)
                        with tir.loop(here) as t:
                            _, rows = rows_of(t)
                            at = tir.let(results + (u * count_of + i) * sums_bytes + t * _RESULT_BYTES)
                            _multiply(c, t0 + t, rows, area, at, blocks, cut > 0)
            with tir.loop(count) as u:
                for i, columns in enumerate(_panels(c, tir.let(first + u))):
                    with tir.loop(here) as t:
                        row0, rows = rows_of(t)
                        at = tir.let(results + (u * count_of + i) * sums_bytes + t * _RESULT_BYTES)
                        _finish(c, columns, row0, rows, at)


@dataclass(frozen=True)
class _Panel:
    """32 columns that pass the unit together: the streams and vectors of their halves, and where they go.

    Of a gated pair, 16 columns of the gate and the same 16 of up: the epilogue finds both side by side.
    """

    sources: list[tuple[Stream, int]]
    column: Any


def _panels(c: Context, unit: Any) -> list[_Panel]:
    """Return the panels of a unit."""
    if not c.spec.pair:
        stream = stream_of(c, unit)
        return [_Panel([(stream, 0), (stream, 1)], tir.let(unit * BLOCK))]
    gate, up = (stream_of(c, unit * 2 + part) for part in range(2))
    return [_Panel([(gate, half), (up, half)], tir.let(unit * BLOCK + half * TILE)) for half in range(2)]


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
    """Return a sink (see Context) that rounds results to the next product's tiles at address `tiles`."""

    def store(row: Any, column: Any, values: list[Any]) -> None:
        block = T.truncdiv(column, T.int64(DEPTH)) * (DEPTH * TILE)
        at = tile_row(row, k_padded) + block + T.truncmod(column, T.int64(DEPTH))
        rounded = tir.Register("uint16", DEPTH)
        rounded.set(isa.matrix.to_bf16(values[0], values[-1]))
        kept = (
            rounded.get()
            if len(values) == 2
            else T.Shuffle([rounded.get()], [T.int32(i) for i in range(TILE)])
        )
        tir.store(tir.buffer_at(tiles, "uint16"), at, kept)

    return store


def fill_panel(sources: list[tuple[Stream, int]], panel: Any, start: Any, stop: Any) -> None:
    """Emit: unpack K in [start, stop) of two vectors of columns, zeros past K, to tiles at `panel`."""
    first_stream = sources[0][0]
    spec, g, isa = first_stream.spec, first_stream.geometry, first_stream.isa
    out = tir.buffer_at(panel, "uint16")
    if spec.weight.is_float:
        _fill_float_panel(sources, out, start, stop)
        return
    run, size = 4 * g.planes, spec.weight.group_size
    group0 = tir.let(T.truncdiv(start, T.int64(size)))
    with tir.loop(T.truncdiv(stop - start, T.int64(size))) as inside:
        group = tir.let(group0 + inside)
        of_group = [group_values(stream, group, vector) for stream, vector in sources]
        with tir.loop(size // run) as step:
            for half, (stream, vector) in enumerate(sources):
                values = float_weights(stream, group, step, vector, of_group[half])
                first = tir.let(T.truncdiv(inside * size + step * run, T.int64(2)))
                for i in range(run // 2):
                    _store_pair(isa, out, first + i, half, values[2 * i], values[2 * i + 1])


def _fill_float_panel(sources: list[tuple[Stream, int]], out: Any, start: Any, stop: Any) -> None:
    isa, k = sources[0][0].isa, sources[0][0].spec.k
    zero = tir.f32(0.0, TILE)

    def store(pair: Any, present: int) -> None:
        for half, (stream, vector) in enumerate(sources):
            values = [tir.let(float_element(stream, start + pair * 2 + j, vector)) for j in range(present)]
            _store_pair(isa, out, pair, half, *values, *[zero] * (2 - present))

    whole = tir.let(T.truncdiv(T.min(stop, T.int64(k)) - start, T.int64(2)))
    with tir.loop(whole) as pair:
        store(pair, 2)
    with tir.span(whole, T.truncdiv(stop - start, T.int64(2))) as pair:
        with tir.when(start + pair * 2 < k):
            store(pair, 1)
        with tir.when(start + pair * 2 >= k):
            store(pair, 0)


def _store_pair(isa: Isa, out: Any, pair: Any, half: int, low: Any, high: Any) -> None:
    """Emit: rows 2 * pair (low) and 2 * pair + 1 (high) of 16 columns, side by side."""
    block, inside = T.truncdiv(pair, T.int64(TILE)), T.truncmod(pair, T.int64(TILE))
    both = tir.Register("uint16", DEPTH)
    both.set(isa.matrix.to_bf16(low, high))
    order = [T.int32(i // 2 + (i % 2) * TILE) for i in range(DEPTH)]
    tir.store(out, ((block * 2 + half) * TILE + inside) * DEPTH, T.Shuffle([both.get()], order))


def _multiply(
    c: Context, t: Any, rows: Any, panel: Any, result: Any, blocks: tuple[Any, Any], more: Any
) -> None:
    """Emit: row tile `t` times the panel of `blocks` (first, count) of K, to fp32 [32][32] at `result`.

    Under the condition `more` the product adds to what stands there.
    """
    for present, condition in ((2, rows > TILE), (1, rows <= TILE)):
        with tir.when(condition):
            _multiply_tiles(c, t, panel, result, blocks, more, present)


def _multiply_tiles(
    c: Context, t: Any, panel: Any, result: Any, blocks: tuple[Any, Any], more: Any, row_tiles: int
) -> None:
    unit, whole, (first, count) = c.isa.matrix, c.k_padded // DEPTH, blocks
    rows_at = tir.let(c.kernel["codes"] + (t * (2 * whole) + first) * TILE_BYTES)
    places = [(r, half) for r in range(row_tiles) for half in range(2)]
    for r, half in places:
        unit.zero(2 * r + half)
    if more is not None:
        with tir.when(more):
            for r, half in places:
                unit.load(2 * r + half, result + (r * TILE * BLOCK + half * TILE) * 4, BLOCK * 4)
    with tir.loop(c.kernel["one"] * count) as block:  # a count that LLVM cannot know is not unrolled
        right = tir.let(panel + block * (2 * TILE_BYTES))
        for half in range(2):
            unit.load(6 + half, right + half * TILE_BYTES)
        for r in range(row_tiles):
            row_at = tir.let(rows_at + block * TILE_BYTES + r * (whole * TILE_BYTES))
            unit.load(4 + r, row_at, passing=True)
        for r, half in places:
            unit.multiply(2 * r + half, 4 + r, 6 + half)
    for r, half in places:
        unit.store(2 * r + half, result + (r * TILE * BLOCK + half * TILE) * 4, BLOCK * 4)


def _finish(c: Context, columns: _Panel, row0: Any, rows: Any, results: Any) -> None:
    """Emit the epilogue of 32 x 32 sums at address `results`."""
    values = tir.buffer_at(results, "float32")
    pair = c.spec.pair
    with tir.loop(rows) as r:
        row = tir.let(row0 + r)
        left, right = (tir.let(tir.load(values, r * BLOCK + half * TILE, TILE)) for half in range(2))
        places = [(columns.column, left, right)] if pair else [
            (columns.column, left, None), (tir.let(columns.column + TILE), right, None)
        ]  # fmt: skip
        if c.sink is not None:
            done = [tir.let(finished(c, row, at, TILE, *held)) for at, *held in places]
            c.sink(row, columns.column, done)
        else:
            for at, first, second in places:
                finish_vector(c, row, at, first, second)
