"""Large M on i8mm: 2 columns by 2 rows over 8 values of K a product, from panels laid out for it."""

from __future__ import annotations

from typing import Any

from ..shared import tir
from ..shared.tir import T
from .packing import BLOCK
from .tvm_cpu_rows import correction_kind
from .tvm_cpu_stream import Prefetch, Stream
from .tvm_cpu_tiles import PANEL_AHEAD, Activations, Tile, add_group

_DEPTH = 8  # values of K of a product


def fill_square_panel(stream: Stream, panel: Any) -> None:
    """Emit: unpack one block's codes to bytes [K/8][32][8]."""
    g, lanes = stream.geometry, stream.isa.lanes
    size, planes = stream.spec.weight.group_size, g.planes
    together = 2 if planes == 1 else 1  # steps that give whole runs of 8
    runs = together * planes // 2
    with tir.loop(g.groups) as group, tir.loop(size // (4 * planes * together)) as step:
        for v in range(BLOCK // lanes):
            raws = [stream.raw(group, tir.let(step * together + i), v) for i in range(together)]
            codes = [stream.plane(raw, p) for raw in raws for p in range(planes)]
            quads = [tir.let(tir.bits(code, f"int32x{lanes}")) for code in codes]
            for run in range(runs):
                at = (group * (size // _DEPTH) + step * runs + run) * (BLOCK * _DEPTH) + v * lanes * _DEPTH
                for half in range(2):  # zip1, zip2
                    order = [T.int32(half * 2 + c + second * lanes) for c in range(2) for second in range(2)]
                    pair = T.Shuffle(quads[2 * run : 2 * run + 2], order)
                    tir.store(panel, at + half * 2 * _DEPTH, tir.bits(pair, "uint8x16"))


def square_tile(
    stream: Stream, act: Activations, tile: Tile, first_vector: int, one: Any, panel: Any
) -> None:
    """Emit: tile = codes . activations over all groups, scaled; rows lie in pairs (see `code_at`).

    `one` is a run-time 1, so that LLVM cannot know the trip count of the inner loop.
    """
    isa, spec, g = stream.isa, stream.spec, stream.geometry
    size, pairs, halves = spec.weight.group_size, tile.rows // 2, 2 * tile.vectors
    width, signed = g.groups * size, spec.weight.bits == 8 and isa.int8_codes == "signed"
    weights = "int8x16" if signed else "uint8x16"
    together = 2 if size % (2 * _DEPTH) == 0 else 1
    start_of = correction_kind(isa, spec) == "int"
    tile.clear()
    with stream.each_group(Prefetch(), [first_vector + v for v in range(tile.vectors)]) as group:
        entries = tir.let(act.row0 * g.groups + group * tile.rows)  # as in int_tile
        acc = [[tir.Register("int32", 4) for _ in range(halves)] for _ in range(pairs)]
        for pair, cells in enumerate(acc):
            value = tir.i32(0, 4)
            if start_of:
                sums = tir.load(act.sc, entries + 2 * pair, 2)
                value = T.Shuffle([sums, sums], [T.int32(i) for i in range(4)])
            for cell in cells:
                cell.set(value)

        with tir.loop(one * (size // (_DEPTH * together))) as part:
            for i in range(together):
                step = tir.let(group * (size // _DEPTH) + part * together + i)
                at = tir.let(step * (BLOCK * _DEPTH) + first_vector * isa.lanes * _DEPTH)
                codes = [tir.let(tir.bits(tir.load(panel, at + h * 16, 16), weights)) for h in range(halves)]
                for line in range(0, halves * 16, 64):
                    tir.prefetch(panel, at + line + PANEL_AHEAD)
                for pair, cells in enumerate(acc):
                    row = (T.truncdiv(act.row0, T.int64(2)) + pair) * (width // 2)
                    words = tir.load(act.q32, row + step * 4, 4)
                    a = tir.let(tir.bits(words, "int8x16"))
                    for cell, code in zip(cells, codes, strict=True):
                        cell.set(isa.emit.square(cell.get(), code, a, not signed))

        def total(r: int, v: int) -> Any:
            """Of [c0r0 c0r1 c1r0 c1r1] and [c2r0 ...] the even or the odd elements: uzp1, uzp2."""
            cells = [acc[r // 2][2 * v + half].get() for half in range(2)]
            return T.Shuffle(cells, [T.int32(i) for i in range(r % 2, 8, 2)])

        add_group(stream, act, tile, first_vector, (group, entries), total)
