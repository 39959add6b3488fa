"""Prefill attention on a bf16 matrix unit: 32 keys x 32 rows a step, softmax in vectors between products.

Everything is transposed: a row of scores is one key against 16 queries, so that maxima, sums and decays of 16
softmaxes are plain vector operations, with none across lanes. Queries, keys, values and softmax weights are
bf16, sums fp32. K and V become tiles once a query tile.

A softmax keeps the maximum that it subtracts until a score, in log2 units, exceeds it by more than 8: weights
stay at 256 or less, and sums are rarely scaled anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..shared import tir
from ..shared.tir import T
from .areas import MATRIX_PANEL, MATRIX_ROWS, matrix_offsets, whole_block_k
from .tvm_cpu_prefill import Prefill
from .tvm_math import Registers, exp2, minus_infinity, transpose
from .tvm_matrix_tiles import TILE, TILE_BYTES, LoadedTile, side_by_side
from .tvm_problem import Problem, quotient, remainder, span

_ROW_BYTES = MATRIX_ROWS * 4  # of transposed scores and sums: one key or one column of V, 32 rows
_Step = Callable[[], None]
_SLACK = 8.0  # how far a score may exceed the maximum that is subtracted, in log2 units


class MatrixPrefill(Prefill):
    """Emitter of the one phase. `block_q` bounds the rows (queries x heads of a group) of a tile."""

    def __init__(self, problem: Problem, block_q: int, block_k: int, counter: Any = None) -> None:
        self.claims = counter
        self.p, self.spec, self.a, self.lanes = problem, problem.spec, problem.args, TILE
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


class _MatrixTile(LoadedTile):
    """One query tile of one sequence and KV head. Row r is query q0 + r // group, head r % group."""

    def row_bounds(self) -> Any:
        """Return where a row block's first and last visible keys are kept: memory, rows are a loop."""
        return self.bounds

    def attend(
        self, row0: Any, j0: Any, begin: Any, end: Any, partial: Any, bounds: Any, poison: Any
    ) -> None:
        """Emit: 32 rows against the keys [begin, end) of the tile."""
        p0 = tir.let(quotient(begin, T.int64(MATRIX_PANEL)))
        p1 = tir.let(quotient(end + (MATRIX_PANEL - 1), T.int64(MATRIX_PANEL)))
        queries = tir.let(self.q_at + quotient(row0, T.int64(TILE)) * (self.depth * TILE_BYTES))
        out = tir.let(self.out_at + row0 * (self.spec.v_head_dim * 4))
        seen = _Seen(bounds, partial)
        most = Registers(4, TILE)  # of even and of odd keys
        for i in range(4):
            most[i] = minus_infinity(TILE)
        self._emit(self._score_tiles(queries, p0))
        self._finish_scores(p0, seen)
        with span(p0 + 1, p1) as p:
            self._emit(self._score_tiles(queries, p), self._maxima(p - 1, most))
            self._finish_scores(p, seen)
        self._emit([], self._maxima(p1 - 1, most))
        subtracted, sums = Registers(2, TILE), Registers(4, TILE)
        for c in range(2):
            self._raise_maximum(tir.let(row0 + c * TILE), out + c * 64, T.max(most[c], most[2 + c]))
            held = Registers(1, TILE)
            held[0] = tir.load(self.m, row0 + c * TILE, TILE)
            subtracted[c] = _finite(held[0])
        for i in range(4):
            sums[i] = tir.f32(0.0, TILE)
        weights = lambda p, c: self._weights(p, c, subtracted, sums)  # noqa: E731
        checked = tir.let(T.And(partial, poison))
        with tir.when(checked):
            with span(p0, p1) as p:
                self._emit([], weights(p, 0) + weights(p, 1))
            self._values_checked(out, p0, p1, seen)
        with tir.when(T.Not(checked)):
            for c in range(2):
                self._value_tiles(out, c, p0, p1, weights)
        for c in range(2):
            total = tir.load(self.l, row0 + c * TILE, TILE) + (sums[c] + sums[2 + c])
            tir.store(self.l, row0 + c * TILE, total)

    @staticmethod
    def _emit(tiles: list[_Step], vectors: list[_Step] | None = None) -> None:
        """Emit the matrix unit's instructions with the vectors' evenly between: both units work at once."""
        vectors = vectors or []
        done = 0
        for i, step in enumerate(tiles):
            step()
            until = len(vectors) * (i + 1) // len(tiles)
            for other in vectors[done:until]:
                other()
            done = until
        for other in vectors[done:]:
            other()

    def _at(self, p: Any, key: int, c: int) -> Any:
        """Return where a key's scores of 16 rows stand, in elements."""
        return p * (MATRIX_PANEL * MATRIX_ROWS) + (key * MATRIX_ROWS + c * TILE)

    def _score_tiles(self, queries: Any, p: Any) -> list[_Step]:
        """scores[keys of panel p, 32 rows] = k . q."""
        unit, steps = self.unit, _Steps()
        p = tir.let(p)
        for tile in range(4):
            steps.add(unit.zero, tile)
        for block in range(self.depth):
            for half in range(2):
                steps.add(unit.load, 4 + half, self.k_at + ((p * 2 + half) * self.depth + block) * TILE_BYTES)
                steps.add(unit.load, 6 + half, queries + (half * self.depth + block) * TILE_BYTES)
            for key in range(2):
                for c in range(2):
                    steps.add(unit.multiply, 2 * key + c, 4 + key, 6 + c)
        for key in range(2):
            for c in range(2):
                at = self.s_at + p * (MATRIX_PANEL * _ROW_BYTES) + (key * TILE * _ROW_BYTES + c * 64)
                steps.add(unit.store, 2 * key + c, at, _ROW_BYTES)
        return steps

    def _maxima(self, p: Any, most: Registers) -> list[_Step]:
        """`most` of the scores of panel p; slots 0 and 1 take even keys, 2 and 3 odd ones."""
        steps = _Steps()
        p = tir.let(p)
        for k in range(MATRIX_PANEL):
            for c in range(2):
                steps.add(self._maximum, most, 2 * (k % 2) + c, self._at(p, k, c))
        return steps

    def _maximum(self, most: Registers, slot: int, at: Any) -> None:
        most[slot] = T.max(most[slot], tir.load(self.scores, at, TILE))

    def _finish_scores(self, p: Any, seen: _Seen) -> None:
        if self.spec.softcap:
            self._cap(p)
        with tir.when(seen.hides_some_of(p)):
            self._mask(p, seen)

    def _cap(self, p: Any) -> None:
        with tir.loop(MATRIX_PANEL) as key:
            for c in range(2):
                at = tir.let(self._at(p, 0, c) + key * MATRIX_ROWS)
                capped = Registers(1, TILE)
                capped[0] = self.p.finish_scores(tir.load(self.scores, at, TILE), None)
                tir.store(self.scores, at, capped[0])

    def _mask(self, p: Any, seen: _Seen) -> None:
        with tir.loop(MATRIX_PANEL) as key:
            for c in range(2):
                at = tir.let(self._at(p, 0, c) + key * MATRIX_ROWS)
                score = tir.load(self.scores, at, TILE)
                hidden = T.Not(seen.by(c, p * MATRIX_PANEL + key))
                tir.store(self.scores, at, T.Select(hidden, minus_infinity(TILE), score))

    def _raise_maximum(self, row: Any, out: Any, most: Any) -> None:
        """Where a score exceeds what is subtracted by far, subtract more; scale l and the sums of 16 rows."""
        old, new = tir.Register("float32", TILE), tir.Register("float32", TILE)
        old.set(tir.load(self.m, row, TILE))
        new.set(T.max(old.get(), most))
        far = T.Select(new.get() - old.get() > tir.f32(_SLACK, TILE), tir.f32(1.0, TILE), tir.f32(0.0, TILE))
        some = Registers(1, 1)
        some[0] = tir.reduce_max(far)
        with tir.when(some[0] > T.float32(0)):
            decay = tir.Register("float32", TILE)
            decay.set(exp2(old.get() - _finite(new.get()), TILE, self.p.isa))
            tir.store(self.m, row, new.get())
            tir.store(self.l, row, tir.load(self.l, row, TILE) * decay.get())
            sums = tir.buffer_at(tir.let(out), "float32")
            with tir.loop(self.spec.v_head_dim) as d:
                at = tir.let(d * MATRIX_ROWS)
                tir.store(sums, at, tir.load(sums, at, TILE) * decay.get())

    def _weights(self, p: Any, c: int, subtracted: Registers, sums: Registers) -> list[_Step]:
        """Scores of a panel and 16 rows to a tile of bf16 weights [16 pairs of keys][16 rows][2]."""
        steps = _Steps()
        p = tir.let(p)
        for pair in range(MATRIX_PANEL // 2):
            steps.add(self._pair_of_weights, p, c, pair, subtracted, sums)
        return steps

    def _pair_of_weights(self, p: Any, c: int, pair: int, subtracted: Registers, sums: Registers) -> None:
        weights, values = tir.buffer_at(self.p_at, "uint16"), Registers(2, TILE)
        for i in range(2):
            score = tir.load(self.scores, self._at(p, 2 * pair + i, c), TILE) - subtracted[c]
            values[i] = exp2(score, TILE, self.p.isa, short=True)
            sums[2 * i + c] = sums[2 * i + c] + values[i]
        both = side_by_side(self.unit.to_bf16(values[0], values[1]))
        tir.store(weights, (p * 2 + c) * 512 + pair * 32, both)

    def _value_tiles(self, out: Any, c: int, p0: Any, p1: Any, weights: Any) -> None:
        """out += V . weights of 16 rows, four tiles of columns at a time.

        With the first four, the weights of a panel are made while the panel before is multiplied.
        """
        unit = self.unit
        for first in range(0, self.columns, 4):
            count = min(4, self.columns - first)
            places = [out + ((first + d) * TILE * _ROW_BYTES + c * 64) for d in range(count)]
            for tile, at in enumerate(places):
                unit.load(tile, at, _ROW_BYTES)
            if first == 0:
                self._emit([], weights(p0, c))
                with span(p0 + 1, p1) as p:
                    self._emit(self._sum_tiles(p - 1, c, first, count), weights(p, c))
                self._emit(self._sum_tiles(p1 - 1, c, first, count))
            else:
                with span(p0, p1) as p:
                    self._emit(self._sum_tiles(p, c, first, count))
            for tile, at in enumerate(places):
                unit.store(tile, at, _ROW_BYTES)

    def _sum_tiles(self, p: Any, c: int, first: int, count: int) -> list[_Step]:
        steps = _Steps()
        p = tir.let(p)
        steps.add(self.unit.load, 4, self.p_at + (p * 2 + c) * TILE_BYTES)
        for d in range(count):
            at = self.v_at + (p * self.columns + (first + d)) * TILE_BYTES
            steps.add(self.unit.load, 5 + d % 3, at)
            steps.add(self.unit.multiply, d, 5 + d % 3, 4)
        return steps

    def _values_checked(self, out: Any, p0: Any, p1: Any, seen: _Seen) -> None:
        """As _value_tiles for a tile with NaN or Inf in V: each row leaves out the keys it does not see."""
        weights, values = (tir.buffer_at(at, "uint16") for at in (self.p_at, self.v_at))
        sums = tir.buffer_at(out, "float32")
        with span(p0 * MATRIX_PANEL, p1 * MATRIX_PANEL) as key:
            p, k = quotient(key, T.int64(MATRIX_PANEL)), tir.let(remainder(key, T.int64(MATRIX_PANEL)))
            for c in range(2):
                weight = Registers(1, TILE)
                pair = tir.let((p * 2 + c) * 512 + quotient(k, T.int64(2)) * 32)
                both = tir.let(tir.bits(tir.load(weights, pair, 32), "uint32x16"))
                odd = T.bitwise_and(both, tir.splat(T.uint32(0xFFFF0000), TILE))
                even = T.shift_left(both, tir.splat(T.uint32(16), TILE))
                with tir.when(remainder(k, T.int64(2)) == T.int64(0)):
                    weight[0] = tir.bits(even, "float32x16")
                with tir.when(remainder(k, T.int64(2)) != T.int64(0)):
                    weight[0] = tir.bits(odd, "float32x16")
                with tir.loop(self.spec.v_head_dim) as d:
                    column = (p * self.columns + quotient(d, T.int64(TILE))) * 512
                    value = tir.let(tir.load(values, column + remainder(d, T.int64(TILE)) * 32 + k))
                    at = tir.let(d * MATRIX_ROWS + c * TILE)
                    held = Registers(2, TILE)
                    held[0] = tir.load(sums, at, TILE)
                    held[1] = held[0] + weight[0] * tir.splat(_widened(value), TILE)
                    tir.store(sums, at, T.Select(seen.by(c, key), held[1], held[0]))

    def _store_rows(self) -> None:
        """32 rows at a time, turned back: the sums of a row side by side."""
        spec = self.spec
        count = tir.let(self.nq * self.group)
        with tir.loop(self.row_blocks) as block:
            first = tir.let(block * MATRIX_ROWS)
            with tir.loop(self.columns) as column:
                for c in range(2):
                    rows = Registers(TILE, TILE)
                    for i in range(TILE):
                        at = first * spec.v_head_dim + (column * TILE + i) * MATRIX_ROWS + c * TILE
                        rows[i] = tir.load(self.out, at, TILE)
                    turned = transpose(rows, TILE)
                    for i in range(TILE):
                        at = (c * TILE + i) * spec.v_head_dim + column * TILE
                        tir.store(self.scores, at, turned[i])
            with span(first, T.min(first + MATRIX_ROWS, count)) as row:
                t, h = self._query(row)
                m, total = tir.load(self.m, row), tir.load(self.l, row)
                self.p.store_row(self.scores, (row - first) * spec.v_head_dim, m, total, self.b, h, t)


class _Steps(list[_Step]):
    """Instructions to emit, in order."""

    def add(self, emit: Callable[..., None], *arguments: Any) -> None:
        """Append emit(*arguments)."""
        self.append(functools.partial(emit, *arguments))


class _Seen:
    """The keys that 32 rows see, from `bounds` (first and last of each row) where `partial` says so."""

    def __init__(self, bounds: Any, partial: Any) -> None:
        self._bounds = bounds
        self._limits = tir.local("int32", 2)  # the last first key, the first last one
        tir.store(self._limits, 0, T.int32(0))
        tir.store(self._limits, 1, T.int32(1 << 30))
        with tir.when(partial):
            largest, least = tir.Register("int32", 2 * TILE), tir.Register("int32", 2 * TILE)
            halves = [tir.let(tir.load(bounds, half * 32, 32)) for half in range(2)]
            largest.set(T.Shuffle(halves, [T.int32(2 * i) for i in range(32)]))
            least.set(T.Shuffle(halves, [T.int32(2 * i + 1) for i in range(32)]))
            tir.store(self._limits, 0, tir.reduce_max(largest.get()))
            tir.store(self._limits, 1, -tir.reduce_max(tir.i32(0, 32) - least.get()))

    def hides_some_of(self, p: Any) -> Any:
        """Whether some row does not see some key of a panel."""
        start = tir.cast(p * MATRIX_PANEL, "int32")
        return T.Or(
            tir.load(self._limits, 0) > start, tir.load(self._limits, 1) < start + T.int32(MATRIX_PANEL)
        )

    def by(self, c: int, key: Any) -> Any:
        """Whether each of 16 rows sees a key."""
        low, high = (
            T.Shuffle([tir.load(self._bounds, c * 32, 32)], [T.int32(2 * i + which) for i in range(TILE)])
            for which in range(2)
        )
        at = tir.splat(tir.cast(key, "int32"), TILE)
        return T.And(low <= at, at < high)


def _finite(largest: Any) -> Any:
    """Return the largest scores, 0 for rows that saw nothing yet (-inf - -inf is NaN)."""
    held = tir.Register("float32", TILE)
    held.set(largest)
    return T.Select(held.get() == minus_infinity(TILE), tir.f32(0.0, TILE), held.get())


def _widened(value: Any) -> Any:
    return tir.bits(T.shift_left(tir.cast(value, "uint32"), T.uint32(16)), "float32")
