"""The probes' kernels: `read` streams memory once, `dot` and `multiply_add` run register tiles from L1."""

from __future__ import annotations

from typing import Any

from ...compiler.target import Target
from ..shared import tir
from ..shared.claim import claimed, reset
from ..shared.isa.table import Isa, for_target
from ..shared.tir import T
from .operations import (
    L1_STEPS,
    LINE_BYTES,
    MATRIX_STEPS,
    PIECE_LINES,
    PIECES,
    TILE_STATE_BYTES,
    TILE_VECTORS,
)


def lower(target: Target) -> list[Any]:
    """Return the PrimFuncs `read`, `dot` and `multiply_add`."""
    isa = for_target(target)
    found = [_read(isa), _dot(isa), _multiply_add(isa)]
    return found if isa.matrix is None else [*found, _matrix(isa)]


def _read(isa: Isa) -> Any:
    """XOR of `lines` runs of LINE_BYTES at `data`; 64 bytes a thread to `out`, which has 64 more at its end.

    Threads take a piece at a time, so that a slow core holds up nobody; memory is asked for as weights are.
    """
    k = tir.Kernel("read", [("threads", "int64"), ("lines", "int64"), ("data", "*int32"), ("out", "int64")])
    lanes, words = isa.lanes, LINE_BYTES // 4
    distance, place = (16384, 1) if isa.name == "amx" else (8192, 3)  # see quant_matmul's space
    out = tir.buffer_at(k["out"], "int32")
    counter = tir.let(k["out"] + k["threads"] * 64)
    reset(counter)
    share = T.truncdiv(k["lines"], k["threads"] * PIECES)
    size = tir.let(T.max(T.min(share, T.int64(PIECE_LINES)), T.int64(1)))
    with tir.parallel(k["threads"]) as thread:
        sums = [tir.Register("int32", lanes) for _ in range(words // lanes)]
        for part in sums:
            part.set(tir.i32(0, lanes))
        pieces = T.truncdiv(k["lines"] + (size - 1), size)
        with claimed(counter, pieces) as piece:
            first = tir.let(piece * size)
            with tir.loop(tir.let(T.min(k["lines"] - first, size))) as i:
                at = tir.let((first + i) * words)
                for line in range(LINE_BYTES // 64):
                    tir.prefetch(k["data"], at + line * 16 + distance // 4, place)
                for v, part in enumerate(sums):
                    part.set(T.bitwise_xor(part.get(), tir.load(k["data"], at + v * lanes, lanes)))
        total: Any = sums[0].get()
        for part in sums[1:]:
            total = T.bitwise_xor(total, part.get())
        tir.store(out, thread * 16, total)
    return k.finish()


def _dot(isa: Isa) -> Any:
    """`rounds` times L1_STEPS steps of a tile of dot4, on every thread; `data` holds the operands."""
    k = tir.Kernel("dot", [("threads", "int64"), ("rounds", "int64"), ("data", "int64"), ("out", "*int32")])
    lanes, rows = isa.lanes, isa.gemm_rows
    kind, width = ("int16", isa.accumulator_lanes) if isa.accumulator == "int16" else ("int32", lanes)
    codes, words = tir.buffer_at(k["data"], "uint8"), tir.buffer_at(k["data"], "int32")
    with tir.parallel(k["threads"]) as thread:
        acc = [[tir.Register(kind, width) for _ in range(TILE_VECTORS)] for _ in range(rows)]
        for row in acc:
            for cell in row:
                cell.set(tir.splat(T.int16(0) if kind == "int16" else T.int32(0), width))
        one = tir.let(T.min(k["threads"], T.int64(1)))
        with tir.loop(k["rounds"]), tir.loop(one * L1_STEPS) as step:
            u = [
                tir.let(tir.load(codes, (step * TILE_VECTORS + v) * 4 * lanes, 4 * lanes))
                for v in range(TILE_VECTORS)
            ]
            for r, row in enumerate(acc):
                s = tir.let(tir.bits(tir.splat(tir.load(words, step * rows + r), lanes), f"int8x{4 * lanes}"))
                for v, cell in enumerate(row):
                    cell.set(isa.dot4(cell.get(), u[v], s))
        total: Any = tir.i32(0, lanes)
        for row in acc:
            for cell in row:
                total = tir.let(total + isa.widen(cell.get()))
        tir.store(k["out"], thread * 16, total)
    return k.finish()


def _matrix(isa: Isa) -> Any:
    """`rounds` times MATRIX_STEPS steps of four bf16 tiles; `data`: the operands, then threads' states."""
    k = tir.Kernel("matrix", [("threads", "int64"), ("rounds", "int64"), ("data", "int64"), ("out", "int64")])
    unit, size = isa.matrix, 1024
    with tir.parallel(k["threads"]) as thread:
        unit.configure(tir.let(k["data"] + MATRIX_STEPS * 4 * size + thread * TILE_STATE_BYTES))
        for tile in range(4):
            unit.zero(tile)
        one = tir.let(T.min(k["threads"], T.int64(1)))
        with tir.loop(k["rounds"]), tir.loop(one * MATRIX_STEPS) as step:
            at = tir.let(k["data"] + step * (4 * size))
            for tile in range(4):
                unit.load(4 + tile, tir.let(at + tile * size))
            for acc in range(4):
                unit.multiply(acc, 4 + acc // 2, 6 + acc % 2)
        for tile in range(4):
            unit.store(tile, tir.let(k["out"] + (thread * 4 + tile) * size))
        unit.release()
    return k.finish()


def _multiply_add(isa: Isa) -> Any:
    """As `_dot`, with fp32 multiply-adds; `data` holds floats."""
    k = tir.Kernel(
        "multiply_add", [("threads", "int64"), ("rounds", "int64"), ("data", "*float32"), ("out", "*float32")]
    )
    lanes, rows = isa.lanes, isa.gemm_rows
    with tir.parallel(k["threads"]) as thread:
        acc = [[tir.Register("float32", lanes) for _ in range(TILE_VECTORS)] for _ in range(rows)]
        for row in acc:
            for cell in row:
                cell.set(tir.f32(0.0, lanes))
        one = tir.let(T.min(k["threads"], T.int64(1)))
        with tir.loop(k["rounds"]), tir.loop(one * L1_STEPS) as step:
            w = [
                tir.let(tir.load(k["data"], (step * TILE_VECTORS + v) * lanes, lanes))
                for v in range(TILE_VECTORS)
            ]
            for r, row in enumerate(acc):
                x = tir.let(tir.splat(tir.load(k["data"], step * rows + r), lanes))
                for v, cell in enumerate(row):
                    cell.set(cell.get() + w[v] * x)
        total: Any = tir.f32(0.0, lanes)
        for row in acc:
            for cell in row:
                total = tir.let(total + cell.get())
        tir.store(k["out"], thread * 16, total)
    return k.finish()
