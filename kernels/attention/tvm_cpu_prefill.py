"""Prefill attention: tiles of query rows x keys, online softmax; K and V converted once a query tile."""

from __future__ import annotations

import abc
from typing import Any

from ..shared import tir
from ..shared.claim import claimed
from ..shared.tir import T
from .areas import prefill_offsets, whole_block_k
from .spec import KEY_BLOCK
from .tvm_math import LOG2_E, Registers, exp2, minus_infinity, transpose
from .tvm_problem import Problem, is_zero, quotient, remainder, safe_maximum, span, widen

_VECTORS = 2  # vectors of keys (or of V's columns) in a register tile: one panel
_UNROLL = 4  # elements of the head dimension a loop step of q . k


class Prefill:
    """Emitter of the one phase. `block_q` bounds the rows (queries x heads of a group) of a tile."""

    def __init__(self, problem: Problem, block_q: int, block_k: int, counter: Any = None) -> None:
        self.claims = counter
        self.p, self.spec, self.a, self.lanes = problem, problem.spec, problem.args, problem.lanes
        self.step = problem.isa.gemm_rows
        self.panel = _VECTORS * self.lanes
        self.block_k = whole_block_k(block_k)
        self.queries = max(1, block_q // self.spec.group)
        self.sizes = prefill_offsets(self.spec, self.step, block_q, self.block_k)
        self.tile: type[QueryTile] = _Tile

    def phase(self, thread: Any) -> None:
        """Emit one thread's work: query tiles as they come, the ones with most keys first."""
        a, spec = self.a, self.spec
        base = tir.let(a.scratch + thread * self.sizes[-1])
        areas = self.areas(base)
        heads = tir.let(a.batch * spec.num_kv_heads)
        tiles = tir.let(quotient(a.tq + (self.queries - 1), T.int64(self.queries)))
        units = tir.let(heads * tiles)
        with claimed(self.counter(), units) as unit:
            tile = tir.let(tiles - 1 - quotient(unit, heads))
            head = tir.let(remainder(unit, heads))
            b = tir.let(quotient(head, T.int64(spec.num_kv_heads)))
            kv_head = tir.let(remainder(head, T.int64(spec.num_kv_heads)))
            q0 = tir.let(tile * self.queries)
            self.tile(self, b, kv_head, q0, areas).emit()

    def counter(self) -> Any:
        """Return the address of the counter of tiles: the caller's, or behind the areas of all threads."""
        if self.claims is not None:
            return self.claims
        return tir.let(self.a.scratch + self.a.threads * self.sizes[-1])

    def areas(self, base: Any) -> list[Any]:
        """Return a thread's areas."""
        kinds = ["float32"] * 8 + ["int32", "float32"]
        return [tir.buffer_at(tir.let(base + o), kind) for o, kind in zip(self.sizes, kinds)]


class QueryTile(abc.ABC):
    """One query tile of one sequence and KV head. Row r is query q0 + r // group, head r % group.

    `out` holds the rows' sums (fp32), `m` and `l` their largest scores in log2 units and their totals.
    """

    out: Any
    m: Any
    l: Any  # noqa: E741  as in the papers

    @abc.abstractmethod
    def take_areas(self, areas: list[Any]) -> None:
        """Name this thread's areas."""

    @abc.abstractmethod
    def row_bounds(self) -> Any:
        """Return where a row block's first and last visible keys are kept."""

    @abc.abstractmethod
    def load_row(self, row: Any, b: Any, h: Any, t: Any) -> None:
        """Emit: q[b, h, t] times the factor to its row."""

    @abc.abstractmethod
    def load_keys(self, j0: Any, keys: Any) -> None:
        """Emit: keys [j0, j0 + keys) as the scores read them."""

    @abc.abstractmethod
    def load_values(self, j0: Any, first: Any, keys: Any) -> Any:
        """Emit: values [j0 + first, j0 + keys) as the sums read them; return whether one is NaN or Inf."""

    @abc.abstractmethod
    def attend(
        self, row0: Any, j0: Any, begin: Any, end: Any, partial: Any, bounds: Any, poison: Any
    ) -> None:
        """Emit: scores, softmax and weighted sum of `step` rows against keys [begin, end) of the tile."""

    def __init__(self, prefill: Prefill, b: Any, kv_head: Any, q0: Any, areas: list[Any]) -> None:
        self.f, self.p, self.spec, self.a = prefill, prefill.p, prefill.spec, prefill.a
        self.lanes, self.step, self.panel = prefill.lanes, prefill.step, prefill.panel
        self.block_k, self.group = prefill.block_k, prefill.spec.group
        self.b, self.kv_head, self.q0 = b, kv_head, q0
        self.take_areas(areas)
        self.nq = tir.let(T.min(T.int64(prefill.queries), self.a.tq - q0))
        self.row_blocks = tir.let(quotient(self.nq * self.group + (self.step - 1), T.int64(self.step)))

    def emit(self) -> None:
        """Emit the tile: queries in, every tile of keys, rows out."""
        self._load_rows()
        low, _ = self.p.interval(self.b, self.q0)
        _, high = self.p.interval(self.b, self.q0 + self.nq - 1)
        self.low, self.high = tir.let(low), tir.let(high)
        start = tir.let(quotient(self.low, T.int64(self.panel)) * self.panel)
        count = quotient(T.max(self.high - start, T.int64(0)) + (self.block_k - 1), T.int64(self.block_k))
        with tir.loop(tir.let(count)) as i:
            j0 = tir.let(start + i * self.block_k)
            keys = tir.let(T.min(T.int64(self.block_k), self.high - j0))
            self.load_keys(j0, keys)
            poison = self.load_values(j0, T.max(self.low - j0, T.int64(0)), keys)
            with tir.loop(self.row_blocks) as block:
                self._row_block(tir.let(block * self.step), j0, keys, poison)
        self._store_rows()

    def _query(self, row: Any) -> tuple[Any, Any]:
        """Return (token, head) of a row; rows past the last belong to the last token."""
        t = T.min(quotient(row, T.int64(self.group)), self.nq - 1)
        return self.q0 + t, self.kv_head * self.group + remainder(row, T.int64(self.group))

    def _load_rows(self) -> None:
        spec, a, lanes = self.spec, self.a, self.lanes
        with tir.loop(self.row_blocks * self.step) as row:
            t, h = self._query(row)
            self.load_row(row, self.b, h, t)
            with tir.loop(spec.v_head_dim // lanes) as i:
                tir.store(self.out, row * spec.v_head_dim + i * lanes, tir.f32(0.0, lanes))
            if spec.sinks:
                sink = tir.local("float32", 1)
                tir.store(sink, 0, tir.load(a.sinks, h) * T.float32(LOG2_E))
                tir.store(self.m, row, tir.load(sink, 0))
                absent = tir.load(sink, 0) == minus_infinity()
                tir.store(self.l, row, T.Select(absent, T.float32(0), T.float32(1)))
            else:
                tir.store(self.m, row, minus_infinity())
                tir.store(self.l, row, T.float32(0))

    def _store_rows(self) -> None:
        with tir.loop(self.nq * self.group) as row:
            t, h = self._query(row)
            at = row * self.spec.v_head_dim
            self.p.store_row(self.out, at, tir.load(self.m, row), tir.load(self.l, row), self.b, h, t)

    def _row_block(self, row0: Any, j0: Any, keys: Any, poison: Any) -> None:
        """Scores, softmax and weighted sum of `step` rows against the tile's keys that they see."""
        first_t, _ = self._query(row0)
        last_t, _ = self._query(row0 + self.step - 1)
        low_min, high_min = (tir.let(x) for x in self.p.interval(self.b, first_t))
        low_max, high_max = (tir.let(x) for x in self.p.interval(self.b, last_t))
        begin = tir.let(T.max(low_min - j0, T.int64(0)))
        end = tir.let(T.min(high_max - j0, keys))
        with tir.when(end > begin):
            p0 = quotient(begin, T.int64(self.panel))
            p1 = quotient(end + (self.panel - 1), T.int64(self.panel))
            partial = tir.let(T.Or(low_max > j0 + p0 * self.panel, high_min < j0 + p1 * self.panel))
            bounds = self.row_bounds()
            with tir.when(partial):
                for r in range(self.step):
                    low, high = self.p.interval(self.b, self._query(row0 + r)[0])
                    clip = lambda x: T.min(T.max(x - j0, T.int64(0)), T.int64(self.block_k))  # noqa: E731
                    tir.store(bounds, 2 * r, tir.cast(clip(low), "int32"))
                    tir.store(bounds, 2 * r + 1, tir.cast(clip(high), "int32"))
            self.attend(row0, j0, begin, end, partial, bounds, poison)


class _Tile(QueryTile):
    """The tile in fp32: K in panels, register tiles of rows x keys and rows x columns of V."""

    def take_areas(self, areas: list[Any]) -> None:
        """Name the areas."""
        self.q, self.out, self.m, self.l, self.kt, self.vt, self.scores, self.bias = areas[:8]
        self.bounds, self.decay = areas[8:]

    def row_bounds(self) -> Any:
        """Return where a row block's first and last visible keys are kept: registers."""
        return tir.local("int32", 2 * self.step)

    def load_row(self, row: Any, b: Any, h: Any, t: Any) -> None:
        """Emit: q[b, h, t] times the factor."""
        self.p.load_query(self.q, row * self.spec.head_dim, b, h, t)

    def load_keys(self, j0: Any, keys: Any) -> None:
        """K of the tile to fp32 panels [keys / panel][D][panel], int8 times its scales."""
        panels = quotient(keys + (self.panel - 1), T.int64(self.panel))
        with tir.loop(tir.let(panels)) as p:
            for v in range(_VECTORS):
                first = tir.let(j0 + p * self.panel + v * self.lanes)
                target = tir.let(p * (self.panel * self.spec.head_dim) + v * self.lanes)
                if self.spec.layout == "blocked":
                    self._copy_block(first, target)
                else:
                    self._transpose_rows(first, j0 + keys - 1, target)

    def _copy_block(self, first: Any, target: Any) -> None:
        """`lanes` keys of the blocked layout; a block is whole, so that lanes past the last key are there."""
        spec, a, lanes = self.spec, self.a, self.lanes
        block = tir.let(quotient(T.min(first, a.tk - 1), T.int64(KEY_BLOCK)))  # not past the last block
        inside = remainder(first, T.int64(KEY_BLOCK))
        base = self.p.row_at("k", self.b, self.kv_head, T.int64(0))
        source = tir.let(base + block * (spec.head_dim * KEY_BLOCK) + inside)
        scale = Registers(1, lanes)
        if spec.kv_dtype == "int8":
            at = self.p.scale_at("k", self.b, self.kv_head) + block * KEY_BLOCK + inside
            scale[0] = tir.load(a.k_scale, at, lanes)
        with tir.loop(spec.head_dim) as d:
            value = widen(a.k, source + d * KEY_BLOCK, lanes)
            if spec.kv_dtype == "int8":
                value = value * scale[0]
            tir.store(self.kt, target + d * self.panel, value)

    def _transpose_rows(self, first: Any, last: Any, target: Any) -> None:
        """`lanes` rows of keys, transposed; rows past the last repeat it."""
        spec, a, lanes = self.spec, self.a, self.lanes
        base = self.p.row_at("k", self.b, self.kv_head, T.int64(0))
        rows = [tir.let(T.min(first + i, last)) for i in range(lanes)]
        at = [tir.let(base + row * a.k_st) for row in rows]
        with tir.loop(spec.head_dim // lanes) as d:
            block = Registers(lanes, lanes)
            for i in range(lanes):
                value = widen(a.k, at[i] + d * lanes, lanes)
                if spec.kv_dtype == "int8":
                    scale = tir.load(a.k_scale, self.p.scale_at("k", self.b, self.kv_head) + rows[i])
                    value = value * tir.splat(scale, lanes)
                block[i] = value
            turned = transpose(block, lanes)
            for i in range(lanes):
                tir.store(self.kt, target + (d * lanes + i) * self.panel, turned[i])

    def load_values(self, j0: Any, first: Any, keys: Any) -> Any:
        """V rows [first, keys) of the tile to fp32; return whether one of them is NaN or Inf."""
        spec, a, lanes = self.spec, self.a, self.lanes
        base = tir.let(self.p.row_at("v", self.b, self.kv_head, T.int64(0)))
        token = spec.v_head_dim if spec.layout == "blocked" else a.v_st
        poison = Registers(1, lanes)
        poison[0] = tir.f32(0.0, lanes)
        with span(first, keys) as j:
            source = tir.let(base + (j0 + j) * token)
            scale = tir.local("float32", 1)
            if spec.kv_dtype == "int8":
                tir.store(scale, 0, tir.load(a.v_scale, self.p.scale_at("v", self.b, self.kv_head) + j0 + j))
            with tir.loop(spec.v_head_dim // lanes) as i:
                held = Registers(1, lanes)
                held[0] = widen(a.v, source + i * lanes, lanes)
                if spec.kv_dtype == "int8":
                    held[0] = held[0] * tir.splat(tir.load(scale, 0), lanes)
                poison[0] = poison[0] + held[0] * tir.f32(0.0, lanes)
                tir.store(self.vt, j * spec.v_head_dim + i * lanes, held[0])
        found = Registers(1, 1)
        found[0] = tir.reduce_add(poison[0])  # 0 or NaN
        return T.Not(is_zero(found[0]))

    def attend(
        self, row0: Any, j0: Any, begin: Any, end: Any, partial: Any, bounds: Any, poison: Any
    ) -> None:
        """Emit: scores, softmax and weighted sum of `step` rows against keys [begin, end) of the tile."""
        p0 = tir.let(quotient(begin, T.int64(self.panel)))
        p1 = tir.let(quotient(end + (self.panel - 1), T.int64(self.panel)))
        if self.spec.mask == "additive":
            self._load_bias(row0, j0, begin, end)
        most = Registers(self.step, self.lanes)
        for r in range(self.step):
            most[r] = minus_infinity(self.lanes)
        with span(p0, p1) as p:
            self._scores(row0, p, partial, bounds, most)
        decay = self._softmax(row0, p0, p1, most)
        with tir.when(T.And(partial, poison)):
            self._values_checked(row0, decay, bounds)
        with tir.when(T.Not(T.And(partial, poison))):
            self._values(row0, begin, end, decay)

    def _load_bias(self, row0: Any, j0: Any, begin: Any, end: Any) -> None:
        with tir.loop(self.step) as r:
            t, h = self._query(row0 + r)
            start = tir.let(self.p.row_at("bias", self.b, h, t) + j0 + begin)
            self.p.stage(self.bias, r * self.block_k + begin, self.a.bias, start, end - begin, LOG2_E)

    def _scores(self, row0: Any, p: Any, partial: Any, bounds: Any, most: Registers) -> None:
        """scores[:, panel p] = q . k, masked where needed; `most` keeps each row's largest by lane."""
        spec, lanes = self.spec, self.lanes
        acc = Registers(self.step * _VECTORS, lanes)
        places = [(r, v) for r in range(self.step) for v in range(_VECTORS)]
        for r, v in places:
            acc[r * _VECTORS + v] = tir.f32(0.0, lanes)
        keys_at = tir.let(p * (self.panel * spec.head_dim))
        query_at = tir.let(row0 * spec.head_dim)
        with tir.loop(spec.head_dim // _UNROLL) as step:
            for u in range(_UNROLL):
                keys = Registers(_VECTORS, lanes)
                for v in range(_VECTORS):
                    at = keys_at + step * (_UNROLL * self.panel) + (u * self.panel + v * lanes)
                    keys[v] = tir.load(self.kt, at, lanes)
                for r in range(self.step):
                    at = query_at + step * _UNROLL + (r * spec.head_dim + u)
                    query = tir.splat(tir.load(self.q, at), lanes)
                    for v in range(_VECTORS):
                        acc.add_product(r * _VECTORS + v, keys[v], query)
        if spec.softcap or spec.mask == "additive":
            for r, v in places:
                bias = None
                if spec.mask == "additive":
                    bias = tir.load(self.bias, p * self.panel + (r * self.block_k + v * lanes), lanes)
                acc[r * _VECTORS + v] = self.p.finish_scores(acc[r * _VECTORS + v], bias)
        with tir.when(partial):
            for r, v in places:
                first = tir.splat(tir.cast(p * self.panel, "int32"), lanes)
                index = T.ramp(T.int32(v * lanes), T.int32(1), lanes) + first
                below = index < tir.splat(tir.load(bounds, 2 * r), lanes)
                above = index >= tir.splat(tir.load(bounds, 2 * r + 1), lanes)
                kept = T.Select(above, minus_infinity(lanes), acc[r * _VECTORS + v])
                acc[r * _VECTORS + v] = T.Select(below, minus_infinity(lanes), kept)
        for r, v in places:
            value = acc[r * _VECTORS + v]
            most[r] = T.max(most[r], value)
            tir.store(self.scores, p * self.panel + (r * self.block_k + v * lanes), value)

    def _softmax(self, row0: Any, p0: Any, p1: Any, most: Registers) -> Any:
        """Scores to weights in place; updates m and l; return the factors that decay the old output."""
        lanes, step = self.lanes, self.step
        padded = -(-step // lanes) * lanes
        decay, safe = tir.local("float32", padded), tir.local("float32", step)
        for r in range(step, padded):
            tir.store(decay, r, T.float32(0))
        for r in range(step):
            old = tir.local("float32", 2)
            tir.store(old, 0, tir.load(self.m, row0 + r))
            tir.store(old, 1, T.max(tir.load(old, 0), tir.reduce_max(most[r])))
            tir.store(self.m, row0 + r, tir.load(old, 1))
            tir.store(safe, r, safe_maximum(tir.load(old, 1)))
            tir.store(decay, r, tir.load(old, 0) - tir.load(safe, r))
        for r in range(0, padded, lanes):
            tir.store(decay, r, exp2(tir.load(decay, r, lanes), lanes, self.p.isa))
        sums = Registers(step, lanes)
        for r in range(step):
            sums[r] = tir.f32(0.0, lanes)
        with span(p0 * _VECTORS, p1 * _VECTORS) as i:
            for r in range(step):
                at = r * self.block_k + i * lanes
                weight = Registers(1, lanes)
                score = tir.load(self.scores, at, lanes) - tir.splat(tir.load(safe, r), lanes)
                weight[0] = exp2(score, lanes, self.p.isa)
                sums[r] = sums[r] + weight[0]
                tir.store(self.scores, at, weight[0])
        for r in range(step):
            total = tir.load(self.l, row0 + r) * tir.load(decay, r) + tir.reduce_add(sums[r])
            tir.store(self.l, row0 + r, total)
        return decay

    def _values(self, row0: Any, begin: Any, end: Any, decay: Any) -> None:
        """out = decay * out + weights @ V over keys [begin, end) of the tile."""
        whole = self.spec.v_head_dim // self.panel
        with tir.loop(whole) as block:
            self._value_block(row0, begin, end, decay, tir.let(block * self.panel), _VECTORS)
        if self.spec.v_head_dim % self.panel:
            self._value_block(row0, begin, end, decay, T.int64(whole * self.panel), 1)

    def _value_block(self, row0: Any, begin: Any, end: Any, decay: Any, column: Any, vectors: int) -> None:
        dim, lanes = self.spec.v_head_dim, self.lanes
        acc = Registers(self.step * vectors, lanes)
        places = [(r, v) for r in range(self.step) for v in range(vectors)]
        base = tir.let(row0 * dim + column)
        for r, v in places:
            old = tir.load(self.out, base + (r * dim + v * lanes), lanes)
            acc[r * vectors + v] = old * tir.splat(tir.load(decay, r), lanes)
        with span(begin, end) as j:
            values = Registers(vectors, lanes)
            for v in range(vectors):
                values[v] = tir.load(self.vt, j * dim + column + v * lanes, lanes)
            for r in range(self.step):
                weight = tir.splat(tir.load(self.scores, j + r * self.block_k), lanes)
                for v in range(vectors):
                    acc.add_product(r * vectors + v, values[v], weight)
        for r, v in places:
            tir.store(self.out, base + (r * dim + v * lanes), acc[r * vectors + v])

    def _values_checked(self, row0: Any, decay: Any, bounds: Any) -> None:
        """As _values for a tile with NaN or Inf in V: each row leaves out the keys that it does not see."""
        dim, lanes = self.spec.v_head_dim, self.lanes
        for r in range(self.step):  # to memory: a register cannot be indexed
            for end in (2 * r, 2 * r + 1):
                tir.store(self.bounds, end, tir.load(bounds, end))
            tir.store(self.decay, r, tir.load(decay, r))
        with tir.loop(self.step) as r:
            low = tir.let(tir.cast(tir.load(self.bounds, 2 * r), "int64"))
            high = tir.let(tir.cast(tir.load(self.bounds, 2 * r + 1), "int64"))
            with tir.loop(dim // lanes) as i:
                at = tir.let((row0 + r) * dim + i * lanes)
                acc = Registers(1, lanes)
                acc[0] = tir.load(self.out, at, lanes) * tir.splat(tir.load(self.decay, r), lanes)
                with span(low, high) as j:
                    weight = tir.splat(tir.load(self.scores, j + r * self.block_k), lanes)
                    acc.add_product(0, tir.load(self.vt, j * dim + i * lanes, lanes), weight)
                tir.store(self.out, at, acc[0])
