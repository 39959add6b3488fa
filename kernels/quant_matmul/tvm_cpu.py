"""The CPU form: functions gemv (M = 1), rows (small M) and gemm (large M) composed of phases and tiles."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...compiler.target import Target
from ..shared import tir
from ..shared.claim import claimed, reset
from ..shared.isa.table import Isa, by_name
from ..shared.math import silu
from ..shared.tir import T
from .packing import BLOCK, Geometry
from .sizes import is_integer, padded_k, panel_bytes, uses_pairs
from .spec import QuantMatmulSpec
from .tvm_cpu_rows import clear_row, correction_kind, quantize_row, widen_row
from .tvm_cpu_tiles import (
    Activations,
    Prefetch,
    Stream,
    Tile,
    fill_float_panel,
    fill_panel,
    float_tile,
    int_tile,
    panel_tile,
)

# "one" is 1 at run time: a trip count times it is one that LLVM cannot know.
ARGUMENTS = ("m", "threads", "one", "x", "w", "bias", "residual", "y", "codes", "scales", "sums", "panel", "counter")


@dataclass
class Context:
    """What the emitters of one function share."""

    isa: Isa
    spec: QuantMatmulSpec
    kernel: Any
    rows: int
    vectors: int

    @property
    def geometry(self) -> Geometry:
        """Sizes of the weight's layout."""
        return Geometry(self.spec.weight, self.spec.k)

    @property
    def integer(self) -> bool:
        """Whether the products are integer."""
        return is_integer(self.spec)

    @property
    def pairs(self) -> bool:
        """Whether the panel of large M is int16 pairs."""
        return uses_pairs(self.spec, self.isa.name)

    @property
    def k_padded(self) -> int:
        """K of the scratch rows."""
        return padded_k(self.spec)

    def row_outputs(self, wide: bool) -> dict[str, Any]:
        """Where the quantiser writes."""
        k = self.kernel
        q = tir.buffer_at(k["codes"], "int16" if wide else "int8")
        sc = tir.buffer_at(k["sums"], "int32" if correction_kind(self.isa, self.spec) == "int" else "float32")
        return {"q16" if wide else "q": q, "sa": k["scales"], "sc": sc, "rows": self.rows}


def lower(spec: QuantMatmulSpec, configuration: Mapping[str, Any], target: Target) -> list[Any]:
    """Return the three PrimFuncs of this problem."""
    isa = by_name(str(configuration.get("isa") or target.isa))
    vectors = BLOCK // isa.lanes
    small, large = int(configuration["small_rows"]), int(configuration["large_rows"])
    prefetch = Prefetch.of(configuration)
    return [
        _direct("gemv", isa, spec, 1, vectors, prefetch),
        _direct("rows", isa, spec, small, min(2, vectors), prefetch),
        _blocked("gemm", isa, spec, large, min(2, vectors)),
    ]


def new_kernel(name: str, spec: QuantMatmulSpec) -> Any:
    types = {
        "m": "int64",
        "threads": "int64",
        "one": "int64",
        "x": "*" + spec.x_dtype,
        "w": "int64",
        "bias": "*float32",
    }
    types |= {"residual": "*" + spec.x_dtype, "y": "*" + spec.x_dtype, "codes": "int64", "scales": "*float32"}
    types |= {"sums": "int64", "panel": "int64", "counter": "int64"}
    return tir.Kernel(name, [(a, types[a]) for a in ARGUMENTS])


def stream_of(c: Context, block: Any) -> Stream:
    views = {"u8": tir.buffer_at(c.kernel["w"], "uint8")}
    views["scale"] = tir.buffer_at(
        c.kernel["w"], c.spec.weight.dtype if c.spec.weight.is_float else c.spec.weight.scale_dtype
    )
    return Stream(c.isa, c.spec, views, tir.let(block * c.geometry.block_bytes))


def _activations(c: Context, row0: Any, wide: bool) -> Activations:
    out = c.row_outputs(wide)
    codes = tir.buffer_at(c.kernel["codes"], "int32")
    return Activations(None if wide else codes, codes if wide else None, out["sa"], out["sc"], row0)


def prepare_row(c: Context, row: Any, wide: bool = False, x_at: Any = None) -> None:
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
        quantize_row(c.isa, spec, k["x"], x_at, c.row_outputs(wide), row)
    with tir.when(row >= k["m"]):
        clear_row(c.isa, spec, c.row_outputs(wide), row)


def _direct(name: str, isa: Isa, spec: QuantMatmulSpec, rows: int, vectors: int, prefetch: Prefetch) -> Any:
    """Small M: rows prepared by the caller, weights unpacked in registers, one linear stream a thread."""
    kernel = new_kernel(name, spec)
    c = Context(isa, spec, kernel, rows, vectors)
    with tir.loop(row_tiles(c) * rows) as row:
        prepare_row(c, row)
    with tir.parallel(kernel["threads"]) as thread:
        direct_share(c, thread, prefetch)
    return kernel.finish()


def row_tiles(c: Context) -> Any:
    """Return how many row tiles cover M."""
    return tir.let(T.truncdiv(c.kernel["m"] + (c.rows - 1), T.int64(c.rows)))


def direct_share(c: Context, thread: Any, prefetch: Prefetch, together: int = 1) -> None:
    """Emit one thread's share of the product of prepared rows; `together` blocks stay on one thread."""
    kernel = c.kernel

    def compute(stream: Stream, tile: Tile, first: int, row0: Any) -> None:
        if c.integer:
            act = _activations(c, row0, wide=False)
            ahead = prefetch if first == 0 else Prefetch()
            int_tile(stream, act, tile, first, c.kernel["one"], prefetch=ahead)
        else:
            float_tile(stream, tir.buffer_at(kernel["codes"], "float32"), row0, c.k_padded, tile, first)

    with _share(c, thread, together) as unit:
        if c.rows == 1:
            with tir.loop(kernel["m"]) as row:
                _unit(c, unit, row, compute)
        else:
            with tir.loop(row_tiles(c)) as t:
                _unit(c, unit, tir.let(t * c.rows), compute)


def _blocked(name: str, isa: Isa, spec: QuantMatmulSpec, rows: int, vectors: int) -> Any:
    """Large M: each thread unpacks a block's codes once and reuses them for every row tile."""
    kernel = new_kernel(name, spec)
    c = Context(isa, spec, kernel, rows, vectors)
    tiles = row_tiles(c)
    with tir.parallel(tiles * rows) as row:
        prepare_row(c, row, wide=c.pairs)
    parts = 2 if spec.epilogue == "silu_pair" else 1
    size = panel_bytes(spec, isa.name) // parts

    reset(kernel["counter"])
    with tir.parallel(kernel["threads"]) as thread, claimed(kernel["counter"], T.int64(units(c))) as unit:
        panels = []
        for part in range(parts):
            at = kernel["panel"] + thread * (size * parts) + part * size
            kind = "s16" if c.pairs else ("u8" if c.integer else "f32")
            panel = tir.buffer_at(at, {"s16": "int16", "u8": "uint8", "f32": "float32"}[kind])
            stream = stream_of(c, unit * parts + part)
            if c.integer:
                fill_panel(stream, {kind: panel})
            else:
                fill_float_panel(stream, panel)
            panels.append({kind: panel})

        def compute(stream: Stream, tile: Tile, first: int, row0: Any, part: int = 0) -> None:
            if c.integer:
                act = _activations(c, row0, wide=c.pairs)
                int_tile(stream, act, tile, first, c.kernel["one"], panel=panels[part])
            else:
                xf = tir.buffer_at(kernel["codes"], "float32")
                panel_tile(tile, panels[part]["f32"], first, xf, row0, c.k_padded, spec.k)

        with tir.loop(tiles) as t:
            _unit(c, unit, tir.let(t * rows), compute)
    return kernel.finish()


def shared_range(total: Any, thread: Any, threads: Any) -> tuple[Any, Any]:
    """Return [first, last) of a thread's contiguous part of `total` things."""
    first = tir.let(T.truncdiv(thread * total, threads))
    return first, tir.let(T.truncdiv((thread + 1) * total, threads))


def units(c: Context) -> int:
    """Return how many column blocks (of a gated epilogue: pairs of blocks) there are."""
    parts = 2 if c.spec.epilogue == "silu_pair" else 1
    return -(-(c.spec.n // parts) // BLOCK)


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
        if c.spec.epilogue == "silu_pair":
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
    for r in range(c.rows):
        with tir.when(row0 + r < c.kernel["m"]):
            for v in range(c.vectors):
                second = up.get(r, v) if up else None
                at = tir.let(column + v * c.isa.lanes)
                finish_vector(c, tir.let(row0 + r), at, tile.get(r, v), second)


def finish_vector(c: Context, row: Any, at: Any, first: Any, second: Any) -> None:
    """Emit one vector of the output, columns [at, at + lanes) of a row; in the last block lane by lane."""
    n, lanes, y = c.spec.n_out, c.isa.lanes, c.kernel["y"]
    if n % BLOCK == 0:
        tir.from_f32(y, row * n + at, _epilogue(c, row, at, lanes, first, second))
        return
    with tir.when(at + lanes <= n):
        tir.from_f32(y, row * n + at, _epilogue(c, row, at, lanes, first, second))
    with tir.when(at + lanes > n):
        held = [tir.local("float32", lanes) for value in (first, second) if value is not None]
        for cell, value in zip(held, (first, second)):
            tir.store(cell, 0, value)
        with tir.loop(T.max(n - at, T.int64(0))) as i:
            values = [tir.load(cell, i) for cell in held]
            result = _epilogue(c, row, at + i, 1, values[0], values[1] if len(values) > 1 else None)
            tir.from_f32(y, row * n + at + i, result)


def _epilogue(c: Context, row: Any, at: Any, width: int, first: Any, second: Any) -> Any:
    """Return `width` finished values of columns `at` and on; `second` is the up part of a gated pair."""
    spec, kernel, n = c.spec, c.kernel, c.spec.n_out
    if spec.bias:
        first = first + tir.load(kernel["bias"], at, width)
    if second is not None:
        if spec.bias:
            second = second + tir.load(kernel["bias"], at + n, width)
        first = silu(first) * second
    if spec.residual:
        first = first + tir.to_f32(kernel["residual"], row * n + at, width)
    return first
