"""The CPU form on a bf16 matrix unit: rows and unpacked blocks in tiles, four accumulators, any M.

Rows of x are rounded once to bf16 tiles [M/16][K/32][16][32]. A thread unpacks a block of 32 columns to
tiles [K/32][2][16][16][2] and multiplies it with every 32 rows; the fp32 results pass the epilogue in L1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...compiler.target import Target
from ..shared import tir
from ..shared.claim import claimed, reset
from ..shared.isa.table import Isa, by_name
from ..shared.tir import T
from .packing import BLOCK
from .sizes import TILE, panel_bytes
from .spec import QuantMatmulSpec
from .tvm_cpu import Context, finish_vector, new_kernel, stream_of, units
from .tvm_cpu_tiles import Stream, float_element, float_weights

ROWS = 2 * TILE  # rows of x that pass a block together
DEPTH = 2 * TILE  # values of K in a tile
TILE_BYTES = 64 * TILE
_RESULT_BYTES = ROWS * BLOCK * 4


def lower(spec: QuantMatmulSpec, configuration: Mapping[str, Any], target: Target) -> list[Any]:
    """Return the PrimFunc `gemm`."""
    isa = by_name(str(configuration.get("isa") or target.isa))
    return [_gemm("gemm", isa, spec)]


def _gemm(name: str, isa: Isa, spec: QuantMatmulSpec) -> Any:
    kernel = new_kernel(name, spec)
    c = Context(isa, spec, kernel, ROWS, 2)
    tiles = tir.let(T.truncdiv(kernel["m"] + (TILE - 1), T.int64(TILE)))
    with tir.parallel(tiles * TILE) as row:
        round_row(c, row)

    parts = 2 if spec.epilogue == "silu_pair" else 1
    panel = c.k_padded * BLOCK * 2
    reset(kernel["counter"])
    with tir.parallel(kernel["threads"]) as thread:
        area = tir.let(kernel["panel"] + thread * panel_bytes(spec, isa.name))
        results = tir.let(area + parts * panel)
        isa.matrix.configure(tir.let(results + parts * _RESULT_BYTES))
        with claimed(kernel["counter"], T.int64(units(c))) as unit:
            for part in range(parts):
                fill_panel(stream_of(c, unit * parts + part), tir.let(area + part * panel), c.k_padded)
            with tir.loop(T.truncdiv(tiles + 1, T.int64(2))) as t:
                row0 = tir.let(t * ROWS)
                rows = tir.let(T.min(kernel["m"] - row0, T.int64(ROWS)))
                for part in range(parts):
                    at = (area + part * panel, results + part * _RESULT_BYTES)
                    with tir.when(rows > TILE):
                        _multiply(c, t, *at, row_tiles=2)
                    with tir.when(rows <= TILE):
                        _multiply(c, t, *at, row_tiles=1)
                _finish(c, unit, row0, rows, results, parts)
        isa.matrix.release()
    return kernel.finish()


def round_row(c: Context, row: Any) -> None:
    """Emit: row `row` of x to its places in the bf16 tiles; zeros past M and K."""
    k, spec = c.kernel, c.spec
    out = tir.buffer_at(k["codes"], "uint16")
    blocks, whole = c.k_padded // DEPTH, spec.k // DEPTH
    first = tir.let(
        (T.truncdiv(row, T.int64(TILE)) * (blocks * TILE) + T.truncmod(row, T.int64(TILE))) * DEPTH
    )
    zeros = tir.splat(T.uint16(0), DEPTH)
    with tir.when(row < k["m"]):
        with tir.loop(whole) as block:
            at = tir.let(row * spec.k + block * DEPTH)
            low, high = (tir.let(tir.to_f32(k["x"], at + half * TILE, TILE)) for half in range(2))
            tir.store(out, first + block * (DEPTH * TILE), c.isa.matrix.to_bf16(low, high))
        for block in range(whole, blocks):
            tir.store(out, first + block * (DEPTH * TILE), zeros)
        with tir.loop(spec.k - whole * DEPTH) as i:
            value = tir.to_f32(k["x"], row * spec.k + whole * DEPTH + i, 1)
            tir.store(out, first + whole * (DEPTH * TILE) + i, tir.bf16_bits(value))
    with tir.when(row >= k["m"]), tir.loop(blocks) as block:
        tir.store(out, first + block * (DEPTH * TILE), zeros)


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
        for half in range(2):
            at = tir.let(unit * BLOCK + half * TILE)
            held = [tir.let(tir.load(v, r * BLOCK + half * TILE, TILE)) for v in values]
            finish_vector(c, row, at, held[0], held[1] if parts == 2 else None)
