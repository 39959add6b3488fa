"""Decode attention: few queries, keys cut into chunks over the threads, partial results merged in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..shared import tir
from ..shared.tir import T
from .areas import decode_offsets
from .spec import KEY_BLOCK
from .tvm_math import LOG2_E, Registers, exp2, minus_infinity, sums_of_four
from .tvm_problem import Problem, even_parts, quotient, remainder, safe_maximum, span, widen

_KEYS_A_PASS = 32  # keys between two loads of the output accumulators: V rows stay in L1 for all columns


class Decode:
    """Emitters of the two phases; `max_chunk` (a multiple of 16) bounds the run-time chunk."""

    def __init__(self, problem: Problem, max_chunk: int, prefetch: bool = True) -> None:
        self.p, self.spec, self.a = problem, problem.spec, problem.args
        self.lanes, self.max_chunk, self.prefetch = problem.lanes, max_chunk, prefetch
        self.accumulators = problem.isa.registers - 4

    def phase_partials(self, thread: Any) -> None:
        """Emit one thread's share: m, l and out of every (sequence, KV head, chunk) of its range."""
        a, spec = self.a, self.spec
        first, chunks = self._chunks()
        partial = self._partials(chunks)
        local = [a.scratch + thread * decode_offsets(spec, self.max_chunk)[-1] + o
                 for o in decode_offsets(spec, self.max_chunk)[:-1]]  # fmt: skip
        q, scores, out, bias, scales = (tir.buffer_at(at, "float32") for at in local)
        units = tir.let(a.batch * spec.num_kv_heads * chunks)
        start = tir.let(quotient(thread * units, a.threads))
        stop = tir.let(quotient((thread + 1) * units, a.threads))
        with span(start, stop) as unit:
            b, kv_head, c = self._place(unit, chunks)
            begin = tir.let((c + first) * a.chunk)
            # While values are read, the next unit's keys are asked for; the last one's are its own, in L2.
            next_b, next_head, next_c = self._place(tir.let(T.min(unit + 1, stop - 1)), chunks)
            step = ((next_c + first) * a.chunk - begin) * self.k_token()
            ahead = tir.let(self.p.row_at("k", next_b, next_head, T.int64(0)) + step)
            with tir.loop(a.tq) as t:
                unit_state = _Unit(self, b, kv_head, t, begin, ahead, q, scores, out, bias, scales)
                unit_state.emit()
                for h in range(spec.group):
                    row = (b * spec.num_heads + kv_head * spec.group + h) * a.tq + t
                    entry = tir.let(row * chunks + c)
                    tir.store(partial[0], entry, tir.load(unit_state.largest, h))
                    tir.store(partial[1], entry, tir.load(unit_state.total, h))
                    with tir.loop(spec.v_head_dim // self.lanes) as i:
                        value = tir.load(out, h * spec.v_head_dim + i * self.lanes, self.lanes)
                        tir.store(partial[2], entry * spec.v_head_dim + i * self.lanes, value)

    def _place(self, unit: Any, chunks: Any) -> tuple[Any, Any, Any]:
        """Emit and return a unit's (sequence, KV head, chunk)."""
        heads, head = T.int64(self.spec.num_kv_heads), tir.let(quotient(unit, chunks))
        return (
            tir.let(quotient(head, heads)),
            tir.let(remainder(head, heads)),
            tir.let(remainder(unit, chunks)),
        )

    def k_token(self) -> Any:
        """Elements of k a token: in the blocked layout its share of a block."""
        return self.spec.head_dim if self.spec.layout == "blocked" else self.a.k_st

    def phase_merge(self, row: Any) -> None:
        """Emit the merge of one row (of batch x heads x queries), chunk by chunk in order."""
        a, spec, lanes = self.a, self.spec, self.lanes
        _, chunks = self._chunks()
        largests, totals, outs = self._partials(chunks)
        t = tir.let(remainder(row, a.tq))
        head = tir.let(quotient(row, a.tq))
        h = tir.let(remainder(head, T.int64(spec.num_heads)))
        b = tir.let(quotient(head, T.int64(spec.num_heads)))
        largest, total, weight = tir.local("float32", 1), tir.local("float32", 1), tir.local("float32", 1)
        tir.store(largest, 0, minus_infinity())
        if spec.sinks:
            tir.store(largest, 0, tir.load(a.sinks, h) * T.float32(LOG2_E))
        with tir.loop(chunks) as c:
            tir.store(largest, 0, T.max(tir.load(largest, 0), tir.load(largests, row * chunks + c)))
        safe = tir.local("float32", 1)
        tir.store(safe, 0, safe_maximum(tir.load(largest, 0)))
        tir.store(total, 0, T.float32(0))
        if spec.sinks:
            tir.store(total, 0, exp2(tir.load(a.sinks, h) * T.float32(LOG2_E) - tir.load(safe, 0), 1))
        # The merged row overwrites the row of its first chunk.
        base = tir.let(row * chunks * spec.v_head_dim)
        with tir.loop(chunks) as c:
            tir.store(weight, 0, exp2(tir.load(largests, row * chunks + c) - tir.load(safe, 0), 1))
            tir.store(total, 0, tir.load(total, 0) + tir.load(totals, row * chunks + c) * tir.load(weight, 0))
            with tir.loop(spec.v_head_dim // lanes) as i:
                at = base + c * spec.v_head_dim + i * lanes
                value = tir.local("float32", lanes)
                tir.store(value, 0, tir.load(outs, at, lanes) * tir.splat(tir.load(weight, 0), lanes))
                with tir.when(c > 0):
                    tir.store(value, 0, tir.load(value, 0, lanes) + tir.load(outs, base + i * lanes, lanes))
                tir.store(outs, base + i * lanes, tir.load(value, 0, lanes))
        self.p.store_row(outs, base, tir.load(largest, 0), tir.load(total, 0), b, h, t)

    def rows(self) -> Any:
        """Return the number of rows to merge."""
        return self.a.batch * self.spec.num_heads * self.a.tq

    def _chunks(self) -> tuple[Any, Any]:
        """Emit and return (first chunk, number of chunks) that some query may see; at least one."""
        a, spec = self.a, self.spec
        low, high = T.int64(0), a.tk + T.int64(0)
        if spec.mask in ("causal", "causal_lengths"):
            high = T.max(T.min(high, a.q_offset + a.tq), T.int64(0))
        if spec.window:
            low = T.min(T.max(a.q_offset - a.window + 1, T.int64(0)), high)
        first = tir.let(quotient(low, a.chunk))
        return first, tir.let(T.max(quotient(high + (a.chunk - 1), a.chunk) - first, T.int64(1)))

    def _partials(self, chunks: Any) -> list[Any]:
        a = self.a
        entries = tir.let(self.rows() * chunks)
        padded = tir.let(quotient(entries + 15, T.int64(16)) * 64)
        base = a.scratch + a.threads * decode_offsets(self.spec, self.max_chunk)[-1]
        return [tir.buffer_at(tir.let(base + i * padded), "float32") for i in range(3)]


@dataclass(frozen=True)
class _ValueTile:
    """Some keys of a chunk: V's first element and token stride, key range, where K of the next unit is."""

    base: Any
    token: Any
    origin: Any
    start: Any
    stop: Any
    ahead: Any
    blocks: int


class _Unit:
    """One query token, one KV head, one chunk: scores, their softmax, the weighted sum of V."""

    def __init__(
        self, decode: Decode, b: Any, kv_head: Any, t: Any, begin: Any, ahead: Any,
        q: Any, scores: Any, out: Any, bias: Any, scales: Any,
    ) -> None:  # fmt: skip
        self.d, self.p, self.spec, self.a, self.lanes = decode, decode.p, decode.spec, decode.a, decode.lanes
        self.b, self.kv_head, self.t, self.begin, self.ahead = b, kv_head, t, begin, ahead
        self.q, self.scores, self.out, self.bias, self.scales = q, scores, out, bias, scales
        self.max_chunk, self.group = decode.max_chunk, decode.spec.group
        self.largest = tir.local("float32", max(self.group, 2))
        self.total = tir.local("float32", max(self.group, 2))

    def emit(self) -> None:
        """Emit everything; a chunk that the query does not see leaves m = -inf, l = 0, out = 0."""
        spec, a, lanes = self.spec, self.a, self.lanes
        low, high = self.p.interval(self.b, self.t)
        first = tir.let(T.max(low, self.begin))
        last = tir.let(T.min(high, self.begin + a.chunk))
        for h in range(self.group):
            tir.store(self.largest, h, minus_infinity())
            tir.store(self.total, h, T.float32(0))
        with tir.loop(self.group * spec.v_head_dim // lanes) as i:
            tir.store(self.out, i * lanes, tir.f32(0.0, lanes))
        with tir.when(last > first):
            for h in range(self.group):
                self.p.load_query(self.q, h * spec.head_dim, self.b, self.kv_head * self.group + h, self.t)
            if spec.layout == "blocked":
                origin = tir.let(quotient(first, T.int64(KEY_BLOCK)) * KEY_BLOCK)
                self._scores_blocked(origin, last)
            else:
                origin = first
                self._scores_strided(first, last)
            self._softmax(origin, first, last)
            self._values(origin, first, last)

    def _scores_blocked(self, origin: Any, last: Any) -> None:
        """q . k for whole blocks of 16 keys: the keys lie along the lanes."""
        spec, a, lanes = self.spec, self.a, self.lanes
        size = spec.head_dim * KEY_BLOCK
        base = tir.let(self.p.row_at("k", self.b, self.kv_head, T.int64(0)) + origin * spec.head_dim)
        vectors = KEY_BLOCK // lanes
        parts = even_parts(self.group, max(1, self.d.accumulators // vectors))
        split = max(s for s in (1, 2, 4) if s == 1 or s * max(parts) * vectors <= self.d.accumulators)
        v_base = tir.let(self.p.row_at("v", self.b, self.kv_head, T.int64(0)))
        v_step = KEY_BLOCK * spec.v_head_dim * split // spec.head_dim
        with tir.loop(quotient(last - origin + (KEY_BLOCK - 1), T.int64(KEY_BLOCK))) as block:
            at = tir.let(base + block * size)
            v_at = tir.let(v_base + (origin + block * KEY_BLOCK) * spec.v_head_dim)
            head0 = 0
            for heads in parts:
                acc = Registers(split * heads * vectors, lanes)
                for i in range(split * heads * vectors):
                    acc[i] = tir.f32(0.0, lanes)
                with tir.loop(spec.head_dim // split) as d0:
                    if self.d.prefetch and head0 == 0:
                        self._prefetch(a.v, v_at + d0 * v_step, v_step)
                    for s in range(split):
                        d = d0 * split + s
                        keys = Registers(vectors, lanes)
                        for v in range(vectors):
                            keys[v] = widen(a.k, at + d * KEY_BLOCK + v * lanes, lanes)
                        for h in range(heads):
                            query = tir.splat(tir.load(self.q, (head0 + h) * spec.head_dim + d), lanes)
                            for v in range(vectors):
                                acc.add_product((s * heads + h) * vectors + v, keys[v], query)
                for h in range(heads):
                    for v in range(vectors):
                        value = acc[h * vectors + v]
                        for s in range(1, split):
                            value = value + acc[(s * heads + h) * vectors + v]
                        where = (head0 + h) * self.max_chunk + block * KEY_BLOCK + v * lanes
                        tir.store(self.scores, where, value)
                head0 += heads

    def _scores_strided(self, first: Any, last: Any) -> None:
        """q . k along the head dimension, four keys at a time; rows past the last repeat it."""
        spec, a, lanes = self.spec, self.a, self.lanes
        base = tir.let(self.p.row_at("k", self.b, self.kv_head, T.int64(0)))
        v_base = tir.let(self.p.row_at("v", self.b, self.kv_head, T.int64(0)))
        parts = even_parts(self.group, max(1, self.d.accumulators // 4))
        with tir.loop(quotient(last - first + 3, T.int64(4))) as four:
            j = tir.let(first + four * 4)
            rows = [tir.let(base + T.min(j + i, last - 1) * a.k_st) for i in range(4)]
            if self.d.prefetch:
                for i in range(4):
                    self._prefetch(a.v, v_base + (j + i) * a.v_st, spec.v_head_dim)
            head0 = 0
            for heads in parts:
                acc = Registers(4 * heads, lanes)
                for i in range(4 * heads):
                    acc[i] = tir.f32(0.0, lanes)
                with tir.loop(spec.head_dim // lanes) as d:
                    for i in range(4):
                        key = Registers(1, lanes)
                        key[0] = widen(a.k, rows[i] + d * lanes, lanes)
                        for h in range(heads):
                            query = tir.load(self.q, (head0 + h) * spec.head_dim + d * lanes, lanes)
                            acc.add_product(h * 4 + i, key[0], query)
                for h in range(heads):
                    total = sums_of_four(acc, h * 4, 1, lanes)
                    tir.store(self.scores, (head0 + h) * self.max_chunk + four * 4, total)
                head0 += heads

    def _softmax(self, origin: Any, first: Any, last: Any) -> None:
        """Scores to weights in place, with their maximum and sum; keys outside [first, last) get 0."""
        spec, a, lanes = self.spec, self.a, self.lanes
        count = tir.let(last - origin)
        vectors = tir.let(quotient(count + (lanes - 1), T.int64(lanes)))
        scaled = spec.kv_dtype == "int8"
        if scaled:
            for i, name in enumerate(("k", "v")):
                source = getattr(a, f"{name}_scale")
                start = self.p.scale_at(name, self.b, self.kv_head) + origin
                self.p.stage(self.scales, T.int64(i * self.max_chunk), source, start, count)
        most = Registers(1, lanes)
        for h in range(self.group):
            if spec.mask == "additive":
                head = self.kv_head * self.group + h
                start = tir.let(self.p.row_at("bias", self.b, head, self.t) + origin)
                self.p.stage(self.bias, T.int64(0), a.bias, start, count, LOG2_E)
            most[0] = minus_infinity(lanes)
            with tir.loop(vectors) as i:
                at = tir.let(h * self.max_chunk + i * lanes)
                held = Registers(1, lanes)
                held[0] = tir.load(self.scores, at, lanes)
                if scaled:
                    held[0] = held[0] * tir.load(self.scales, i * lanes, lanes)
                bias = tir.load(self.bias, i * lanes, lanes) if spec.mask == "additive" else None
                held[0] = self.p.finish_scores(held[0], bias)
                with tir.when(T.Or(i * lanes < first - origin, (i + 1) * lanes > count)):
                    held[0] = self._masked(held[0], i * lanes, first - origin, count)
                tir.store(self.scores, at, held[0])
                most[0] = T.max(most[0], held[0])
            tir.store(self.largest, h, tir.reduce_max(most[0]))
        safe, sums = tir.local("float32", max(self.group, 2)), Registers(self.group, lanes)
        for h in range(self.group):
            tir.store(safe, h, safe_maximum(tir.load(self.largest, h)))
            sums[h] = tir.f32(0.0, lanes)
        with tir.loop(vectors) as i:
            for h in range(self.group):
                at = h * self.max_chunk + i * lanes
                held = Registers(1, lanes)
                score = tir.load(self.scores, at, lanes) - tir.splat(tir.load(safe, h), lanes)
                held[0] = exp2(score, lanes, self.p.isa)
                sums[h] = sums[h] + held[0]
                if scaled:
                    held[0] = held[0] * tir.load(self.scales, self.max_chunk + i * lanes, lanes)
                tir.store(self.scores, at, held[0])
        for h in range(self.group):
            tir.store(self.total, h, tir.reduce_add(sums[h]))

    def _masked(self, value: Any, at: Any, first: Any, count: Any) -> Any:
        lanes = self.lanes
        index = T.ramp(T.int32(0), T.int32(1), lanes) + tir.splat(tir.cast(at, "int32"), lanes)
        below = index < tir.splat(tir.cast(first, "int32"), lanes)
        above = index >= tir.splat(tir.cast(count, "int32"), lanes)
        return T.Select(below, minus_infinity(lanes), T.Select(above, minus_infinity(lanes), value))

    def _values(self, origin: Any, first: Any, last: Any) -> None:
        """out += weights @ V: some keys at a time, so that V rows stay in L1 for all column blocks."""
        spec, a, lanes = self.spec, self.a, self.lanes
        base = tir.let(self.p.row_at("v", self.b, self.kv_head, T.int64(0)))
        token = spec.v_head_dim if spec.layout == "blocked" else a.v_st
        parts, columns = self._value_tiles()
        vectors = spec.v_head_dim // lanes
        whole, rest = divmod(vectors, columns)
        with tir.loop(quotient(last - first + (_KEYS_A_PASS - 1), T.int64(_KEYS_A_PASS))) as some:
            j0 = tir.let(first + some * _KEYS_A_PASS)
            j1 = tir.let(T.min(j0 + _KEYS_A_PASS, last))
            tile = _ValueTile(base, token, origin, j0, j1, self.ahead, whole + (rest > 0))
            with tir.loop(whole) as block:
                self._column_block(tile, block, columns, columns, parts)
            if rest:
                self._column_block(tile, T.int64(whole), columns, rest, parts)

    def _column_block(self, tile: _ValueTile, block: Any, size: int, columns: int, parts: list[int]) -> None:
        column = tir.let(block * (size * self.lanes))
        head0 = 0
        for heads in parts:
            self._value_tile(tile, block, column, columns, head0, heads)
            head0 += heads

    def _value_tile(
        self, tile: _ValueTile, block: Any, column: Any, columns: int, head0: int, heads: int
    ) -> None:
        spec, a, lanes = self.spec, self.a, self.lanes
        acc = Registers(heads * columns, lanes)
        places = [(h, v) for h in range(heads) for v in range(columns)]
        for h, v in places:
            at = (head0 + h) * spec.v_head_dim + column + v * lanes
            acc[h * columns + v] = tir.load(self.out, at, lanes)
        with span(tile.start, tile.stop) as j:
            row = tir.let(tile.base + j * tile.token + column)
            if self.d.prefetch and head0 == 0:
                share = -(-spec.head_dim // tile.blocks)
                self._prefetch(a.k, tile.ahead + j * self.d.k_token() + block * share, share)
            weights, value = Registers(heads, lanes), Registers(1, lanes)
            for h in range(heads):
                weight = tir.load(self.scores, (head0 + h) * self.max_chunk + (j - tile.origin))
                weights[h] = tir.splat(weight, lanes)
            for v in range(columns):  # one V vector at a time: the weights and sums fill the registers
                value[0] = widen(a.v, row + v * lanes, lanes)
                for h in range(heads):
                    acc.add_product(h * columns + v, value[0], weights[h])
        for h, v in places:
            at = (head0 + h) * spec.v_head_dim + column + v * lanes
            tir.store(self.out, at, acc[h * columns + v])

    def _value_tiles(self) -> tuple[list[int], int]:
        """Return (heads of each part, vectors of a column block) with the fewest instructions a key."""
        vectors, best = self.spec.v_head_dim // self.lanes, None
        spare = 1 if self.spec.kv_dtype == "float32" else 2  # for V on its way to fp32
        for columns in range(1, vectors + 1):
            for most in range(1, self.group + 1):
                parts = even_parts(self.group, most)
                heads = max(parts)
                if heads * columns + heads + spare > self.p.isa.registers:
                    continue
                blocks = [columns] * (vectors // columns) + [vectors % columns] * (vectors % columns > 0)
                # Fewer than eight accumulators wait for the multiply-add's latency.
                cost = sum(3 * c + h + h * c * max(1.0, 8 / (h * c)) for c in blocks for h in parts)
                if best is None or cost < best[0]:
                    best = (cost, parts, columns)
        assert best is not None
        return best[1], best[2]

    def _prefetch(self, buffer: Any, at: Any, elements: int) -> None:
        """Prefetch `elements` into L2: keys while values are read, values while keys are."""
        size = {"float32": 4, "int8": 1}.get(str(buffer.dtype), 2)
        for line in range(-(-elements * size // 64)):
            tir.prefetch(buffer, at + line * 64 // size, 2)
