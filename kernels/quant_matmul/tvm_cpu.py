"""The CPU form: functions gemv (M = 1), rows (small M) and gemm (large M) composed of phases and tiles."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ...compiler.target import Target
from ..shared import tir
from ..shared.claim import claimed, reset
from ..shared.isa.table import Isa, by_name
from ..shared.tir import T
from .packing import BLOCK
from .sizes import panel_bytes
from .spec import QuantMatmulSpec
from .tvm_cpu_context import Context, finish_vector, new_kernel, row_tiles, shared_range, stream_of, units
from .tvm_cpu_matrix import ROWS, matrix_share, round_row
from .tvm_cpu_rows import clear_row, quantize_row, widen_row
from .tvm_cpu_squares import fill_square_panel, square_tile
from .tvm_cpu_stream import Prefetch, Stream
from .tvm_cpu_tiles import (
    Activations,
    Tile,
    fill_float_panel,
    fill_panel,
    float_tile,
    int_tile,
    panel_tile,
)

_STACK_ARRAY_BYTES = 1023  # TVM keeps larger arrays in workspaces


def lower(spec: QuantMatmulSpec, configuration: Mapping[str, Any], target: Target) -> list[Any]:
    """Return the PrimFuncs of this problem: gemv, rows, wide and gemm; on a matrix unit gemm alone."""
    isa = by_name(str(configuration.get("isa") or target.isa))
    large = many_rows(spec, configuration)
    if spec.activation == "bfloat16":
        return [_many("gemm", isa, spec, large, 2)]
    most = BLOCK // isa.lanes
    names = ("gemv_vectors", "small_vectors", "tile_vectors")
    single, few, many = (min(int(configuration[name]), most) for name in names)
    small, wide = int(configuration["small_rows"]), int(configuration["wide_rows"])
    parts = [("gemv", 1, single), ("rows", small, few), ("wide", wide, few)]
    return [
        *(
            _direct(name, isa, spec, rows, vectors, Prefetch.of(configuration, rows))
            for name, rows, vectors in parts
            if rows
        ),
        _many("gemm", isa, spec, large, many),
    ]


def many_rows(spec: QuantMatmulSpec, configuration: Mapping[str, Any]) -> int:
    """Return the rows of a tile for large M."""
    return ROWS if spec.activation == "bfloat16" else int(configuration["large_rows"])


def _activations(c: Context, row0: Any, many: bool) -> Activations:
    out = c.row_outputs(many)
    codes, wide = tir.buffer_at(c.kernel["codes"], "int32"), many and c.pairs
    return Activations(None if wide else codes, codes if wide else None, out["sa"], out["sc"], row0)


def prepare_row(c: Context, row: Any, many: bool = False, x_at: Any = None) -> None:
    """Emit the first phase for one row: quantise it, or copy it to fp32; rows past M become zeros.

    The row is read at element `x_at` of x, if that is not row * K.
    """
    k, spec = c.kernel, c.spec
    x_at = row * spec.k if x_at is None else x_at
    if not c.integer:
        with tir.when(row < k["m"]):
            xf = tir.buffer_at(k["codes"], "float32")
            widen_row(c.isa, spec, k["x"], x_at, xf, row, c.k_padded)
        with tir.when(row >= k["m"]), tir.loop(c.k_padded // 16) as v:
            tir.store(tir.buffer_at(k["codes"], "float32"), row * c.k_padded + v * 16, tir.f32(0.0, 16))
        return
    with tir.when(row < k["m"]):
        quantize_row(c.isa, spec, k["x"], x_at, c.row_outputs(many), row)
    with tir.when(row >= k["m"]):
        clear_row(c.isa, spec, c.row_outputs(many), row)


def _direct(name: str, isa: Isa, spec: QuantMatmulSpec, rows: int, vectors: int, prefetch: Prefetch) -> Any:
    """Small M: rows prepared by the caller, weights unpacked in registers, one linear stream a thread."""
    kernel = new_kernel(name, spec)
    c = Context(isa, spec, kernel, rows, vectors)
    with tir.loop(row_tiles(c) * rows) as row:
        prepare_row(c, row)
    with tir.parallel(kernel["threads"]) as thread:
        direct_share(c, thread, prefetch)
    return kernel.finish()


def direct_share(c: Context, thread: Any, prefetch: Prefetch, together: int = 1, share: Any = None) -> None:
    """Emit one thread's share of the product of prepared rows; `together` blocks stay on one thread.

    `share` is a context that emits the loop over the column blocks, where it is not a contiguous range.
    """
    kernel, once = c.kernel, c.rows == 1 and c.vectors * c.isa.lanes == BLOCK
    prefetch = prefetch if once else prefetch.kept()

    def compute(stream: Stream, tile: Tile, first: int, row0: Any) -> None:
        if c.integer:
            act = _activations(c, row0, many=False)
            ahead = prefetch if first == 0 else Prefetch()
            int_tile(stream, act, tile, first, c.kernel["one"], prefetch=ahead)
        else:
            float_tile(stream, tir.buffer_at(kernel["codes"], "float32"), row0, c.k_padded, tile, first)

    with share or _share(c, thread, together) as unit:
        if c.rows == 1:
            with tir.loop(kernel["m"]) as row:
                _unit(c, unit, row, compute)
        else:
            with tir.loop(row_tiles(c)) as t:
                _unit(c, unit, tir.let(t * c.rows), compute)


def _many(name: str, isa: Isa, spec: QuantMatmulSpec, rows: int, vectors: int) -> Any:
    """Large M: rows prepared in parallel, then column blocks claimed by the threads."""
    kernel = new_kernel(name, spec)
    c = Context(isa, spec, kernel, rows, min(vectors, BLOCK // isa.lanes))
    with tir.parallel(row_tiles(c) * rows) as row:
        prepare_many(c, row)
    reset(kernel["counter"])
    with tir.parallel(kernel["threads"]) as thread:
        many_share(c, thread)
    return kernel.finish()


def prepare_many(c: Context, row: Any, x_at: Any = None) -> None:
    """Emit the first phase for one row of large M (see `prepare_row`)."""
    if c.matrix:
        round_row(c, row, x_at)
    else:
        prepare_row(c, row, many=True, x_at=x_at)


def many_share(c: Context, thread: Any) -> None:
    """Emit one thread's work on prepared rows: blocks as they come, each unpacked once for all row tiles."""
    if c.matrix:
        matrix_share(c, thread)
        return
    spec, kernel, tiles = c.spec, c.kernel, row_tiles(c)
    parts = 2 if spec.pair else 1
    size = panel_bytes(spec, c.isa.name) // parts
    with claimed(kernel["counter"], T.int64(units(c))) as unit:
        panels = []
        for part in range(parts):
            at = kernel["panel"] + thread * (size * parts) + part * size
            kind = "s16" if c.pairs else ("u8" if c.integer else "f32")
            panel = tir.buffer_at(at, {"s16": "int16", "u8": "uint8", "f32": "float32"}[kind])
            stream = stream_of(c, unit * parts + part)
            if c.squares:
                fill_square_panel(stream, panel)
            elif c.integer:
                fill_panel(stream, {kind: panel})
            else:
                fill_float_panel(stream, panel)
            panels.append({kind: panel})

        def compute(stream: Stream, tile: Tile, first: int, row0: Any, part: int = 0) -> None:
            if c.squares:
                act = _activations(c, row0, many=True)
                square_tile(stream, act, tile, first, c.kernel["one"], panels[part]["u8"])
            elif c.integer:
                act = _activations(c, row0, many=True)
                int_tile(stream, act, tile, first, c.kernel["one"], panel=panels[part])
            else:
                xf = tir.buffer_at(kernel["codes"], "float32")
                panel_tile(tile, panels[part]["f32"], first, xf, row0, c.k_padded, spec.k)

        with tir.loop(tiles) as t:
            _unit(c, unit, tir.let(t * c.rows), compute)


@contextlib.contextmanager
def _share(c: Context, thread: Any, together: int = 1) -> Iterator[Any]:
    """Loop over a thread's contiguous range of column blocks (of block pairs for a gated epilogue)."""
    first, last = shared_range(-(-units(c) // together), thread, c.kernel["threads"])
    begin = tir.let(first * together) if together > 1 else first
    end = tir.let(T.min(last * together, T.int64(units(c)))) if together > 1 else last
    with tir.loop(tir.let(end - begin)) as i:
        yield tir.let(begin + i)


def _unit(c: Context, unit: Any, row0: Any, compute: Callable[..., None]) -> None:
    """Emit all tiles of one unit (a block, or a gate and up pair) for one row tile, with the epilogue."""
    isa = c.isa
    for first in range(0, BLOCK // isa.lanes, c.vectors):
        column = tir.let(unit * BLOCK + first * isa.lanes)
        if c.spec.pair:
            gate, up = Tile(isa, c.rows, c.vectors), Tile(isa, c.rows, c.vectors)
            for part, tile in enumerate((gate, up)):
                extra = {"part": part} if compute.__defaults__ else {}
                compute(stream_of(c, unit * 2 + part), tile, first, row0, **extra)
            _finish(c, gate, row0, column, up)
        else:
            tile = Tile(isa, c.rows, c.vectors)
            compute(stream_of(c, unit), tile, first, row0)
            _finish(c, tile, row0, column, None)


def _finish(c: Context, tile: Tile, row0: Any, column: Any, up: Tile | None) -> None:
    """Emit bias, gate, residual and the stores; columns past N and rows past M are not touched."""
    spec, lanes = c.spec, c.isa.lanes
    plain = spec.n_out % BLOCK == 0 and not (spec.pair or spec.softcap)
    if c.rows > 1 and not plain:
        _finish_in_a_loop(c, tile, row0, column, up)
        return
    for r in range(c.rows):
        with tir.when(row0 + r < c.kernel["m"]):
            for v in range(c.vectors):
                second = up.get(r, v) if up else None
                at = tir.let(column + v * lanes)
                finish_vector(c, tir.let(row0 + r), at, tile.get(r, v), second)


def _finish_in_a_loop(c: Context, tile: Tile, row0: Any, column: Any, up: Tile | None) -> None:
    """Emit the same by way of memory: an epilogue of many instructions, once and not for every vector."""
    lanes, width = c.isa.lanes, c.vectors * c.isa.lanes
    chunks = -(-c.rows // (_STACK_ARRAY_BYTES // (4 * width)))
    most = -(-c.rows // chunks)
    for start in range(0, c.rows, most):
        count = min(most, c.rows - start)
        parts = [tile, up] if up else [tile]
        held = [tir.local("float32", count * width) for _ in parts]
        for (r, v), (part, memory) in itertools.product(
            itertools.product(range(count), range(c.vectors)), zip(parts, held)
        ):
            tir.store(memory, r * width + v * lanes, part.get(start + r, v))
        first_row = tir.let(row0 + start)
        present = tir.let(T.max(T.min(c.kernel["m"] - first_row, T.int64(count)), T.int64(0)))
        with tir.loop(present) as r, tir.loop(c.vectors) as v:
            cells = [tir.Register("float32", lanes) for _ in parts]  # TVM would load a bound value twice
            for cell, memory in zip(cells, held):
                cell.set(tir.load(memory, r * width + v * lanes, lanes))
            second = cells[1].get() if up else None
            finish_vector(c, tir.let(first_row + r), tir.let(column + v * lanes), cells[0].get(), second)
