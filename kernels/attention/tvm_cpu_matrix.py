"""Prefill attention on a bf16 matrix unit: 32 rows x 32 keys a step, softmax in vectors between products.

Queries, keys, values and softmax weights are bf16, sums fp32. K and V become tiles once a query tile.
"""

from __future__ import annotations

from typing import Any

from ..shared import tir
from ..shared.tir import T
from .areas import MATRIX_PANEL, MATRIX_ROWS, matrix_offsets, score_stride, whole_block_k
from .spec import KEY_BLOCK
from .tvm_cpu_prefill import Prefill, QueryTile
from .tvm_math import Registers, exp2_bf16, minus_infinity, transpose
from .tvm_problem import Problem, quotient, remainder, safe_maximum, span, widen

_TILE = 16
_TILE_BYTES = 1024
_PAIRS = [i // 2 + (i % 2) * _TILE for i in range(2 * _TILE)]  # two vectors side by side, element by element


class MatrixPrefill(Prefill):
    """Emitter of the one phase. `block_q` bounds the rows (queries x heads of a group) of a tile."""

    def __init__(self, problem: Problem, block_q: int, block_k: int, counter: Any = None) -> None:
        self.claims = counter
        self.p, self.spec, self.a, self.lanes = problem, problem.spec, problem.args, _TILE
        self.step, self.panel = MATRIX_ROWS, MATRIX_PANEL
        self.block_k = whole_block_k(block_k)
        self.queries = max(1, block_q // self.spec.group)
        self.sizes = matrix_offsets(self.spec, block_q, self.block_k)
        self.tile = _MatrixTile

    def phase(self, thread: Any) -> None:
        """Emit one thread's share of the query tiles, with the tile registers set up around it."""
        unit = self.p.isa.matrix
        unit.configure(tir.let(self.a.scratch + thread * self.sizes[-1] + self.sizes[-2]))
        super().phase(thread)
        unit.release()

    def areas(self, base: Any) -> list[Any]:
        """Return the addresses of a thread's areas."""
        return [tir.let(base + offset) for offset in self.sizes[:-2]]


class _MatrixTile(QueryTile):
    """One query tile of one sequence and KV head. Row r is query q0 + r // group, head r % group."""

    def take_areas(self, areas: list[Any]) -> None:
        """Name the areas: addresses of tiles, and fp32 views."""
        self.unit = self.p.isa.matrix
        self.depth = -(-self.spec.head_dim // (2 * _TILE))
        self.columns = self.spec.v_head_dim // _TILE
        self.q_at, self.out_at, m, rows, self.k_at, self.v_at, self.s_at, self.p_at, bounds = areas
        self.out, self.m, self.l = (tir.buffer_at(at, "float32") for at in (self.out_at, m, rows))
        self.scores = tir.buffer_at(self.s_at, "float32")
        self.bounds = tir.buffer_at(bounds, "int32")
        self.stride = score_stride(self.block_k)

    def load_row(self, row: Any, b: Any, h: Any, t: Any) -> None:
        """Emit: q[b, h, t] times the factor to its row of the bf16 tiles."""
        spec, a = self.spec, self.a
        source = tir.let(self.p.row_at("q", b, h, t))
        to = tir.buffer_at(self.q_at, "uint16")
        first = tir.let(
            (quotient(row, T.int64(_TILE)) * (self.depth * _TILE) + remainder(row, T.int64(_TILE))) * 32
        )
        for block in range(self.depth):
            halves = []
            for half in range(2):
                at = block * 32 + half * _TILE
                zero = tir.f32(0.0, _TILE)
                value = zero if at >= spec.head_dim else tir.to_f32(a.q, source + at, _TILE)
                halves.append(tir.let(value * tir.splat(a.factor, _TILE)))
            tir.store(to, first + block * (_TILE * 32), self.unit.to_bf16(*halves))

    def load_keys(self, j0: Any, keys: Any) -> None:
        """Emit: keys to tiles [keys / 16][depth][16 pairs of elements][16 keys][2]."""
        blocks = tir.let(quotient(keys + (MATRIX_PANEL - 1), T.int64(MATRIX_PANEL)) * 2)
        with tir.loop(blocks) as block:
            first = tir.let(j0 + block * _TILE)
            to = tir.buffer_at(tir.let(self.k_at + block * (self.depth * _TILE_BYTES)), "uint16")
            if self.spec.layout == "blocked":
                self._keys_of_block(first, to)
            else:
                self._keys_of_rows(first, j0 + keys - 1, to)

    def _keys_of_block(self, first: Any, to: Any) -> None:
        spec, a = self.spec, self.a
        block = tir.let(quotient(T.min(first, a.tk - 1), T.int64(KEY_BLOCK)))  # not past the last block
        source = tir.let(
            self.p.row_at("k", self.b, self.kv_head, T.int64(0)) + block * (spec.head_dim * KEY_BLOCK)
        )
        scale = Registers(1, _TILE)
        if spec.kv_dtype == "int8":
            scale[0] = tir.load(
                a.k_scale, self.p.scale_at("k", self.b, self.kv_head) + block * KEY_BLOCK, KEY_BLOCK
            )
        with tir.loop(spec.head_dim // 2) as pair:
            at = tir.let(source + pair * (2 * KEY_BLOCK))
            if spec.kv_dtype == "bfloat16":
                both = tir.bits(tir.load(a.k, at, 2 * KEY_BLOCK), "uint16x32")
            else:
                halves = [widen(a.k, at + half * KEY_BLOCK, KEY_BLOCK) for half in range(2)]
                if spec.kv_dtype == "int8":
                    halves = [half * scale[0] for half in halves]
                both = self.unit.to_bf16(*(tir.let(half) for half in halves))
            tir.store(to, pair * 32, _side_by_side(both))
        for pair in range(spec.head_dim // 2, self.depth * _TILE):
            tir.store(to, pair * 32, tir.splat(T.uint16(0), 32))

    def _keys_of_rows(self, first: Any, last: Any, to: Any) -> None:
        """16 rows of keys, pairs of elements transposed as one word; rows past the last repeat it."""
        spec, a = self.spec, self.a
        base = self.p.row_at("k", self.b, self.kv_head, T.int64(0))
        rows = [tir.let(T.min(first + i, last)) for i in range(_TILE)]
        at = [tir.let(base + row * a.k_st) for row in rows]
        for block in range(self.depth):
            words = Registers(_TILE, _TILE)
            for i in range(_TILE):
                halves = []
                for half in range(2):
                    offset = block * 32 + half * _TILE
                    inside = offset < spec.head_dim
                    value = widen(a.k, at[i] + offset, _TILE) if inside else tir.f32(0.0, _TILE)
                    if spec.kv_dtype == "int8" and inside:
                        scale = tir.load(a.k_scale, self.p.scale_at("k", self.b, self.kv_head) + rows[i])
                        value = value * tir.splat(scale, _TILE)
                    halves.append(tir.let(value))
                words[i] = tir.bits(self.unit.to_bf16(*halves), "float32x16")
            turned = transpose(words, _TILE)
            for i in range(_TILE):
                tir.store(to, (block * _TILE + i) * 32, tir.bits(turned[i], "uint16x32"))

    def load_values(self, j0: Any, first: Any, keys: Any) -> Any:
        """Emit: V rows [first, keys), zeros around, to tiles [keys / 32][Dv / 16][16 pairs of keys][16][2].

        Returns whether one of them is NaN or Inf.
        """
        spec, a = self.spec, self.a
        base = tir.let(self.p.row_at("v", self.b, self.kv_head, T.int64(0)))
        token = spec.v_head_dim if spec.layout == "blocked" else a.v_st
        to = tir.buffer_at(self.v_at, "uint16")
        largest = tir.Register("uint16", 32)
        largest.set(tir.splat(T.uint16(0), 32))
        panels = quotient(keys + (MATRIX_PANEL - 1), T.int64(MATRIX_PANEL))
        with tir.loop(tir.let(panels * _TILE)) as pair:
            tile = tir.let(
                quotient(pair, T.int64(_TILE)) * (self.columns * _TILE) + remainder(pair, T.int64(_TILE))
            )
            js = [tir.let(pair * 2 + i) for i in range(2)]
            inside = [T.And(j >= first, j < keys) for j in js]
            rows = [tir.let(base + (j0 + T.min(T.max(j, first), keys - 1)) * token) for j in js]
            scales = []
            if spec.kv_dtype == "int8":
                at = self.p.scale_at("v", self.b, self.kv_head) + j0
                scales = [tir.let(tir.load(a.v_scale, at + T.min(T.max(j, first), keys - 1))) for j in js]
            with tir.when(T.And(*inside)):
                self._pair_of_values(to, tile, rows, scales, [True, True], largest)
            with tir.when(T.And(inside[0], T.Not(inside[1]))):
                self._pair_of_values(to, tile, rows, scales, [True, False], largest)
            with tir.when(T.And(T.Not(inside[0]), inside[1])):
                self._pair_of_values(to, tile, rows, scales, [False, True], largest)
            with tir.when(T.Not(T.Or(*inside))), tir.loop(self.columns) as c:
                tir.store(to, (tile + c * _TILE) * 32, tir.splat(T.uint16(0), 32))
        held = tir.local("uint16", 32)
        tir.store(held, 0, largest.get())
        most = tir.Register("uint16", 1)
        most.set(T.uint16(0))
        with tir.loop(32) as i:
            most.set(T.max(most.get(), tir.load(held, i)))
        return most.get() >= T.uint16(0x7F80)

    def _pair_of_values(
        self, to: Any, tile: Any, rows: list[Any], scales: list[Any], inside: list[bool], largest: Any
    ) -> None:
        spec, a = self.spec, self.a
        with tir.loop(self.columns) as c:
            if spec.kv_dtype == "bfloat16":
                zero = tir.splat(T.uint16(0), _TILE)
                halves = [
                    tir.let(tir.bits(tir.load(a.v, row + c * _TILE, _TILE), "uint16x16")) if there else zero
                    for row, there in zip(rows, inside)
                ]
                both = T.Shuffle(halves, [T.int32(i) for i in _PAIRS])
            else:
                halves = [
                    widen(a.v, row + c * _TILE, _TILE) if there else tir.f32(0.0, _TILE)
                    for row, there in zip(rows, inside)
                ]
                if scales:
                    halves = [half * tir.splat(scale, _TILE) for half, scale in zip(halves, scales)]
                both = _side_by_side(self.unit.to_bf16(*(tir.let(half) for half in halves)))
            held = tir.Register("uint16", 32)
            held.set(both)
            magnitude = T.bitwise_and(held.get(), tir.splat(T.uint16(0x7FFF), 32))
            largest.set(T.max(largest.get(), magnitude))
            tir.store(to, (tile + c * _TILE) * 32, held.get())

    def row_bounds(self) -> Any:
        """Return where a row block's first and last visible keys are kept: memory, rows are a loop."""
        return self.bounds

    def attend(
        self, row0: Any, j0: Any, begin: Any, end: Any, partial: Any, bounds: Any, poison: Any
    ) -> None:
        """Emit: 32 rows against the keys [begin, end) of the tile."""
        p0 = tir.let(quotient(begin, T.int64(MATRIX_PANEL)))
        p1 = tir.let(quotient(end + (MATRIX_PANEL - 1), T.int64(MATRIX_PANEL)))
        rows_at = tir.let(quotient(row0, T.int64(_TILE)))
        with span(p0, p1) as p:
            self._score_tiles(rows_at, p)
        if self.spec.softcap:
            self._cap(p0, p1)
        with tir.when(partial):
            self._mask(p0, p1, bounds)
        self._softmax(row0, p0, p1)
        with tir.when(T.And(partial, poison)):
            self._values_checked(row0, bounds)
        with tir.when(T.Not(T.And(partial, poison))):
            self._value_tiles(row0, p0, p1)

    def _score_tiles(self, rows_at: Any, p: Any) -> None:
        unit = self.unit
        for tile in range(4):
            unit.zero(tile)
        for block in range(self.depth):
            for half in range(2):
                unit.load(6 + half, self.k_at + ((p * 2 + half) * self.depth + block) * _TILE_BYTES)
                unit.load(4 + half, self.q_at + ((rows_at + half) * self.depth + block) * _TILE_BYTES)
            for r in range(2):
                for half in range(2):
                    unit.multiply(2 * r + half, 4 + r, 6 + half)
        for r in range(2):
            for half in range(2):
                at = self.s_at + p * (MATRIX_PANEL * 4) + (r * _TILE * self.stride + half * 64)
                unit.store(2 * r + half, at, self.stride)

    def _row(self, r: Any, p: Any, half: int) -> Any:
        """Return where a row's scores of half a panel stand, in elements."""
        return r * (self.stride // 4) + p * MATRIX_PANEL + half * _TILE

    def _cap(self, p0: Any, p1: Any) -> None:
        with tir.loop(self.step) as r, span(p0, p1) as p:
            for half in range(2):
                at = tir.let(self._row(r, p, half))
                capped = Registers(1, _TILE)
                capped[0] = self.p.finish_scores(tir.load(self.scores, at, _TILE), None)
                tir.store(self.scores, at, capped[0])

    def _mask(self, p0: Any, p1: Any, bounds: Any) -> None:
        with tir.loop(self.step) as r:
            low = tir.splat(tir.let(tir.load(bounds, 2 * r)), _TILE)
            high = tir.splat(tir.let(tir.load(bounds, 2 * r + 1)), _TILE)
            with span(p0, p1) as p:
                for half in range(2):
                    at = tir.let(self._row(r, p, half))
                    first = tir.splat(tir.cast(p * MATRIX_PANEL + half * _TILE, "int32"), _TILE)
                    index = T.ramp(T.int32(0), T.int32(1), _TILE) + first
                    hidden = T.Or(index < low, index >= high)
                    score = tir.load(self.scores, at, _TILE)
                    tir.store(self.scores, at, T.Select(hidden, minus_infinity(_TILE), score))

    def _softmax(self, row0: Any, p0: Any, p1: Any) -> None:
        """Scores to bf16 weights in tiles; m, l and the decayed output follow, row by row."""
        spec = self.spec
        weights = tir.buffer_at(self.p_at, "uint16")
        with tir.loop(self.step) as r:
            row = tir.let(row0 + r)
            most = Registers(2, _TILE)
            most[0], most[1] = minus_infinity(_TILE), minus_infinity(_TILE)
            with span(p0, p1) as p:
                for half in range(2):
                    at = tir.let(self._row(r, p, half))
                    most[half] = T.max(most[half], tir.load(self.scores, at, _TILE))
            m = Registers(3, 1)  # old, new, new as a number to subtract
            m[0] = tir.load(self.m, row)
            m[1] = T.max(m[0], tir.reduce_max(T.max(most[0], most[1])))
            m[2] = safe_maximum(m[1])
            sums = Registers(2, _TILE)
            sums[0], sums[1] = tir.f32(0.0, _TILE), tir.f32(0.0, _TILE)
            place = tir.let(
                quotient(r, T.int64(_TILE)) * (self.block_k // MATRIX_PANEL * _TILE)
                + remainder(r, T.int64(_TILE))
            )
            with span(p0, p1) as p:
                values = Registers(2, _TILE)
                for half in range(2):
                    score = tir.load(self.scores, self._row(r, p, half), _TILE)
                    values[half] = exp2_bf16(score - tir.splat(m[2], _TILE), _TILE)
                    sums[half] = sums[half] + values[half]
                tir.store(weights, (place + p * _TILE) * 32, self.unit.to_bf16(values[0], values[1]))
            total = Registers(1, 1)
            total[0] = tir.reduce_add(sums[0] + sums[1])
            with tir.when(m[1] > m[0]):
                decay = Registers(1, 1)
                decay[0] = exp2_bf16(m[0] - m[2], 1)
                tir.store(self.m, row, m[1])
                tir.store(self.l, row, tir.load(self.l, row) * decay[0])
                with tir.loop(self.columns) as c:
                    at = tir.let(row * spec.v_head_dim + c * _TILE)
                    tir.store(self.out, at, tir.load(self.out, at, _TILE) * tir.splat(decay[0], _TILE))
            tir.store(self.l, row, tir.load(self.l, row) + total[0])

    def _value_tiles(self, row0: Any, p0: Any, p1: Any) -> None:
        """out += weights @ V, two tiles of columns at a time."""
        unit, width = self.unit, self.spec.v_head_dim * 4
        for first in range(0, self.columns, 2):
            count = min(2, self.columns - first)
            for act in (unit.load, None, unit.store):
                for r in range(2):
                    for c in range(count):
                        if act is not None:
                            at = self.out_at + row0 * width + (r * _TILE * width + (first + c) * 64)
                            act(2 * r + c, at, width)
                if act is not None:
                    continue
                with span(p0, p1) as p:
                    for c in range(count):
                        unit.load(6 + c, self.v_at + (p * self.columns + (first + c)) * _TILE_BYTES)
                    for r in range(2):
                        unit.load(4 + r, self.p_at + (p + r * (self.block_k // MATRIX_PANEL)) * _TILE_BYTES)
                    for r in range(2):
                        for c in range(count):
                            unit.multiply(2 * r + c, 4 + r, 6 + c)

    def _values_checked(self, row0: Any, bounds: Any) -> None:
        """As _value_tiles for a tile with NaN or Inf in V: each row leaves out the keys it does not see."""
        dim = self.spec.v_head_dim
        weights = tir.buffer_at(self.p_at, "uint16")
        with tir.loop(self.step) as r:
            low = tir.let(tir.cast(tir.load(bounds, 2 * r), "int64"))
            high = tir.let(tir.cast(tir.load(bounds, 2 * r + 1), "int64"))
            place = tir.let(
                quotient(r, T.int64(_TILE)) * (self.block_k // MATRIX_PANEL * _TILE)
                + remainder(r, T.int64(_TILE))
            )
            with tir.loop(self.columns) as c:
                at = tir.let((row0 + r) * dim + c * _TILE)
                acc = Registers(1, _TILE)
                acc[0] = tir.load(self.out, at, _TILE)
                with span(low, high) as j:
                    p, k = quotient(j, T.int64(MATRIX_PANEL)), remainder(j, T.int64(MATRIX_PANEL))
                    weight = _widened(tir.load(weights, (place + p * _TILE) * 32 + k))
                    pair = ((p * self.columns + c) * _TILE + quotient(k, T.int64(2))) * 32
                    column = tir.load(tir.buffer_at(self.v_at, "uint32"), quotient(pair, T.int64(2)), _TILE)
                    odd = T.bitwise_and(column, tir.splat(T.uint32(0xFFFF0000), _TILE))
                    even = T.shift_left(column, tir.splat(T.uint32(16), _TILE))
                    word = Registers(1, _TILE)
                    with tir.when(remainder(k, T.int64(2)) == T.int64(0)):
                        word[0] = tir.bits(even, "float32x16")
                    with tir.when(remainder(k, T.int64(2)) != T.int64(0)):
                        word[0] = tir.bits(odd, "float32x16")
                    acc.add_product(0, word[0], tir.splat(weight, _TILE))
                tir.store(self.out, at, acc[0])


def _widened(value: Any) -> Any:
    return tir.bits(T.shift_left(tir.cast(value, "uint32"), T.uint32(16)), "float32")


def _side_by_side(both: Any) -> Any:
    held = tir.Register("uint16", 32)
    held.set(both)
    return T.Shuffle([held.get()], [T.int32(i) for i in _PAIRS])
