"""Register tiles of the CPU form: rows x vectors of a 32-column block, over all of K."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..shared import tir
from ..shared.isa.table import Isa
from ..shared.tir import T
from .packing import BLOCK
from .tvm_cpu_rows import correction_kind
from .tvm_cpu_stream import Prefetch, Stream, float_element, float_weights

PANEL_AHEAD = 2048  # bytes; a panel of more than L1 comes from L2
_STRAIGHT = 4  # accumulators up to which a group's steps are emitted in a line


class Tile:
    """fp32 accumulators, one register a vector, or in L1 where those run out."""

    def __init__(self, isa: Isa, rows: int, vectors: int) -> None:
        self.isa, self.rows, self.vectors = isa, rows, vectors
        self._arrays = [[tir.Register("float32", isa.lanes) for _ in range(vectors)] for _ in range(rows)]

    def clear(self) -> None:
        """Emit zeros."""
        for r in range(self.rows):
            for v in range(self.vectors):
                self.set(r, v, tir.f32(0.0, self.isa.lanes))

    def get(self, row: int, vector: int) -> Any:
        """Return one accumulator."""
        return self._arrays[row][vector].get()

    def set(self, row: int, vector: int, value: Any) -> None:
        """Emit a store to one accumulator."""
        self._arrays[row][vector].set(value)

    def add(self, row: int, vector: int, value: Any) -> None:
        """Emit an addition to one accumulator."""
        self.set(row, vector, self.get(row, vector) + value)


_NO_PREFETCH = Prefetch()


@dataclass
class Activations:
    """The quantised rows: `q32` codes seen as int32 (4 each), `q16x2` int16 codes seen so (2 each)."""

    q32: Any
    q16x2: Any
    sa: Any
    sc: Any
    row0: Any


def int_tile(
    stream: Stream,
    act: Activations,
    tile: Tile,
    first_vector: int,
    one: Any,
    panel: Any = None,
    prefetch: Prefetch = _NO_PREFETCH,
) -> None:
    """Emit: tile = codes . activations over all groups, scaled; exact integers inside a group.

    `one` is a run-time 1, so that LLVM cannot know the trip count of the inner loop.
    `panel` (views "u8" or "s16" of unpacked codes [K/4][32][4] or [K/2][32][2]) replaces the stream's codes.
    """
    isa, spec, g = stream.isa, stream.spec, stream.geometry
    rows, vectors, lanes = tile.rows, tile.vectors, isa.lanes
    size, planes = spec.weight.group_size, g.planes
    signed = spec.weight.bits == 8 and isa.int8_codes == "signed"
    pairs = panel is not None and panel.get("s16") is not None
    umax = 255 if spec.weight.bits == 8 else (1 << spec.weight.bits) - 1
    narrow = isa.accumulator == "int16" and not signed and not pairs
    correction = correction_kind(isa, spec)
    k_padded = g.groups * size
    per_step = 2 if pairs else (4 if panel is not None else 4 * planes)
    steps = size // per_step
    dots_per_step = 1 if panel is not None else planes
    burst = isa.dot4_steps(umax)  # dot products that an int16 accumulator holds
    chunk = steps if not narrow else max(1, min(steps, burst // dots_per_step))
    while steps % chunk:
        chunk -= 1

    def in_line(count: int) -> bool:
        """Whether the code of so many steps is emitted once for each, without a loop."""
        return rows * vectors <= _STRAIGHT or count == 1

    tile.clear()
    with stream.each_group(prefetch, [first_vector + v for v in range(vectors)]) as group:
        entries = tir.let(act.row0 * g.groups + group * rows)  # scales lie as [row tiles][groups][rows]
        acc_type, width = ("int16", isa.accumulator_lanes) if narrow else ("int32", lanes)
        acc = [[tir.Register(acc_type, width) for _ in range(vectors)] for _ in range(rows)]
        wide = (
            [[tir.Register("int32", lanes) for _ in range(vectors)] for _ in range(rows)]
            if chunk < steps or (narrow and burst < dots_per_step)
            else []
        )

        def start(r: int) -> Any:
            """The accumulator's first value: the correction where it is free, else zero."""
            if correction == "int" and not narrow:
                return tir.splat(tir.load(act.sc, entries + r), lanes)
            return tir.splat(T.int16(0) if narrow else T.int32(0), width)

        def one_step(step: Any, words: Any = None, element: int = 0) -> None:
            """Emit one step; its activations are `element` of each row's `words`, or loaded here."""
            operands: Iterable[list[Any]] = []  # [dot][vector]
            if panel is None:
                raws = [stream.raw(group, step, first_vector + v) for v in range(vectors)]
                operands = ([tir.let(stream.plane(raw, p)) for raw in raws] for p in range(planes))
                if len(spec.weight.plane_bits) == 1:
                    operands = list(operands)  # all at once, where they fit the registers
            elif pairs:
                at = (group * steps + step) * (BLOCK * 2) + first_vector * lanes * 2
                operands = [
                    [tir.let(tir.load(panel["s16"], at + v * lanes * 2, 2 * lanes)) for v in range(vectors)]
                ]
            else:
                at = (group * steps + step) * (BLOCK * 4) + first_vector * lanes * 4
                operands = [
                    [tir.let(tir.load(panel["u8"], at + v * lanes * 4, 4 * lanes)) for v in range(vectors)]
                ]
                for line in range(0, vectors * lanes * 4, 64):
                    tir.prefetch(panel["u8"], at + line + PANEL_AHEAD)
            for d, codes in enumerate(operands):
                if straight:
                    left = steps * dots_per_step - (step * dots_per_step + d)
                    stream.prefetch_some(left)
                if narrow and d and d % burst == 0:
                    flush()
                    begin()
                for r in range(rows):
                    if words:
                        word = T.Shuffle([words[r].get()], [T.int32(element)])
                    elif pairs:
                        word = tir.load(
                            act.q16x2, (act.row0 + r) * (k_padded // 2) + group * (size // 2) + step
                        )
                    else:
                        index = group * (size // 4) + step * dots_per_step + d
                        word = tir.load(act.q32, (act.row0 + r) * (k_padded // 4) + index)
                    a = tir.let(tir.splat(word, lanes))
                    for v, code in enumerate(codes):
                        acc[r][v].set(_dot(isa, acc[r][v].get(), code, a, signed, pairs))

        def run(count: int, first: Any) -> None:
            if in_line(count):
                for s in range(count):
                    one_step(first + s)
                return
            together = isa.words if panel is not None and not pairs else 1
            if together > 1 and count % together == 0:
                words = [tir.Register("int32", together) for _ in range(rows)]
                with tir.loop(one * (count // together)) as s:
                    at = tir.let(first + s * together)
                    for r in range(rows):
                        word = (act.row0 + r) * (k_padded // 4) + group * (size // 4) + at
                        words[r].set(tir.load(act.q32, word, together))
                    for i in range(together):
                        one_step(tir.let(at + i), words, i)
                return
            # The first steps in a line start the accumulators without an addition; the others in a loop
            # whose count LLVM cannot know: it would unroll a known one and spill what it hoists. Of 16
            # registers it spills when it unpacks two steps at once, too.
            peeled = 2 if count % 2 == 0 and (panel is not None or isa.registers > 16) else 1
            for s in range(peeled):
                one_step(tir.let(first + s))
            with tir.loop(one * ((count - peeled) // peeled)) as s:
                for i in range(peeled):
                    one_step(tir.let(first + peeled + s * peeled + i))

        straight = not wide and in_line(steps)
        if not straight:
            stream.prefetch_some(1)

        def begin() -> None:
            for r in range(rows):
                value = start(r)
                for v in range(vectors):
                    acc[r][v].set(value)

        def flush() -> None:
            for r in range(rows):
                for v in range(vectors):
                    wide[r][v].set(wide[r][v].get() + isa.widen(acc[r][v].get()))

        if not wide:
            begin()
            run(steps, 0)
        else:
            for r in range(rows):
                for v in range(vectors):
                    wide[r][v].set(tir.i32(0, lanes))
            with tir.loop(steps // chunk) as part:
                begin()
                run(chunk, part * chunk)
                flush()

        def total(r: int, v: int) -> Any:
            value = wide[r][v].get() if wide else acc[r][v].get()
            value = isa.widen(value) if narrow and not wide else value
            if correction == "int" and narrow:
                value = value + tir.splat(tir.load(act.sc, entries + r), lanes)
            return value

        add_group(stream, act, tile, first_vector, (group, entries), total)


def add_group(
    stream: Stream,
    act: Activations,
    tile: Tile,
    first_vector: int,
    where: tuple[Any, Any],
    total: Callable[[int, int], Any],
) -> None:
    """Emit: tile += the integer sums `total(row, vector)` of a group, scaled, and the part of its zeros.

    `where` is the group, and the entry of its first row's scale.
    """
    (group, entries), lanes, zero = where, tile.isa.lanes, stream.spec.weight.zero
    scales = [tir.let(stream.scale(group, first_vector + v)) for v in range(tile.vectors)]
    zeros: list[Any] = []
    if zero == "minimum":
        zeros = [tir.let(stream.zero(group, first_vector + v)) for v in range(tile.vectors)]
    elif zero == "integer":
        zeros = [
            tir.let(stream.zero(group, first_vector + v) * scales[v] * tir.f32(-1.0, lanes))
            for v in range(tile.vectors)
        ]
    for r in range(tile.rows):
        sa = tir.let(tir.splat(tir.load(act.sa, entries + r), lanes))
        for v in range(tile.vectors):
            value = tile.get(r, v) + tir.cast(total(r, v), "float32") * (scales[v] * sa)
            if zeros:
                value = value + zeros[v] * tir.splat(tir.load(act.sc, entries + r), lanes)
            tile.set(r, v, value)


def _dot(isa: Isa, acc: Any, code: Any, a: Any, signed: bool, pairs: bool) -> Any:
    n = 4 * isa.lanes
    if pairs:
        return isa.dot2(acc, code, tir.bits(a, f"int16x{2 * isa.lanes}"))
    if signed:
        return isa.dot4_signed(acc, tir.bits(code, f"int8x{n}"), tir.bits(a, f"int8x{n}"))
    return isa.dot4(acc, code, tir.bits(a, f"int8x{n}"))


def fill_panel(stream: Stream, panel: dict[str, Any]) -> None:
    """Emit: unpack one block's codes to bytes [K/4][32][4], or to int16 [K/2][32][2]."""
    isa, g = stream.isa, stream.geometry
    size, planes, lanes = stream.spec.weight.group_size, g.planes, isa.lanes
    with tir.loop(g.groups) as group, tir.loop(size // (4 * planes)) as step:
        for v in range(BLOCK // lanes):
            raw = stream.raw(group, step, v)
            for p in range(planes):
                run = tir.let(group * (size // 4) + step * planes + p)
                codes = stream.plane(raw, p)
                if panel.get("u8") is not None:
                    tir.store(panel["u8"], (run * BLOCK + v * lanes) * 4, codes)
                    continue
                # int16 pairs: bytes 0,1 of every column go to run 2r, bytes 2,3 to run 2r+1
                n = 4 * lanes
                wide = tir.let(tir.cast(tir.bits(codes, f"int8x{n}"), "int16"))
                for half in range(2):
                    lanes_of_half = [T.int32(c * 4 + half * 2 + j) for c in range(lanes) for j in range(2)]
                    at = ((run * 2 + half) * BLOCK + v * lanes) * 2
                    tir.store(panel["s16"], at, T.Shuffle([wide], lanes_of_half))


def float_tile(stream: Stream, xf: Any, row0: Any, k_padded: int, tile: Tile, first_vector: int) -> None:
    """Emit: tile = x . W over all of K in fp32, weights converted in registers."""
    spec = stream.spec
    tile.clear()
    if spec.weight.is_float:
        _float_steps(
            tile, spec.k, lambda k, v: float_element(stream, k, first_vector + v), xf, row0, k_padded
        )
        return
    run, vectors = 4 * stream.geometry.planes, [first_vector + v for v in range(tile.vectors)]
    with stream.each_group(_NO_PREFETCH, vectors) as group, tir.loop(spec.weight.group_size // run) as step:
        for v in range(tile.vectors):
            for i, value in enumerate(float_weights(stream, group, step, first_vector + v)):
                for r in range(tile.rows):
                    at = (row0 + r) * k_padded + group * spec.weight.group_size + step * run + i
                    tile.add(r, v, tir.splat(tir.load(xf, at), tile.isa.lanes) * value)


def _float_steps(tile: Tile, k: int, weight: Any, xf: Any, row0: Any, k_padded: int) -> None:
    def one(at: Any) -> None:
        values = [tir.let(weight(at, v)) for v in range(tile.vectors)]
        for r in range(tile.rows):
            x = tir.let(tir.splat(tir.load(xf, (row0 + r) * k_padded + at), tile.isa.lanes))
            for v, value in enumerate(values):
                tile.add(r, v, x * value)

    unroll = 4
    with tir.loop(k // unroll) as outer:
        for u in range(unroll):
            one(tir.let(outer * unroll + u))
    with tir.loop(k % unroll) as rest:
        one(tir.let(rest + k // unroll * unroll))


def panel_tile(tile: Tile, panel: Any, first_vector: int, xf: Any, row0: Any, k_padded: int, k: int) -> None:
    """Emit: tile = x . panel, the panel fp32 [K][32]."""
    lanes = tile.isa.lanes
    tile.clear()
    load = lambda at, v: tir.load(panel, at * BLOCK + (first_vector + v) * lanes, lanes)  # noqa: E731
    _float_steps(tile, k, load, xf, row0, k_padded)


def fill_float_panel(stream: Stream, panel: Any) -> None:
    """Emit: convert one block to fp32 [K][32]."""
    isa, spec, g = stream.isa, stream.spec, stream.geometry
    if spec.weight.is_float:
        with tir.loop(spec.k) as k:
            for v in range(BLOCK // isa.lanes):
                tir.store(panel, k * BLOCK + v * isa.lanes, float_element(stream, k, v))
        return
    run = 4 * g.planes
    with tir.loop(g.groups) as group, tir.loop(spec.weight.group_size // run) as step:
        for v in range(BLOCK // isa.lanes):
            for i, value in enumerate(float_weights(stream, group, step, v)):
                at = (group * spec.weight.group_size + step * run + i) * BLOCK + v * isa.lanes
                tir.store(panel, at, value)
