"""The phases of sampling as emitters: one row of logits, for a kernel of its own or a whole step."""

from __future__ import annotations

from typing import Any

from ..shared import tir
from ..shared.math import fold, pieces, vector_type
from ..shared.tir import T
from .spec import CAP, EXP2, FRACTION_BITS, ONE, WEIGHT_BITS, SamplingSpec
from .tvm_select import CandidateList, mul_shift31, philox_pair
from .workspace import BIN_SHIFT, BINS, BLOCK, LIVE_BINS, Workspace


class RowSampler:
    """Emit the choice of a token from logits[offset:], with scratch at an int64 address.

    Construction emits the first pass: the maximum of every block of 256 logits, and of the row.
    """

    def __init__(self, spec: SamplingSpec, lanes: int, logits: Any, offset: Any, scratch: Any) -> None:
        self.vocab, self.lanes, self.logits, self.offset = spec.vocab_size, lanes, logits, offset
        self.space = Workspace(spec.vocab_size)
        parts = self.space.parts
        self.parts = {
            name: tir.buffer_at(tir.let(scratch + at), dtype)
            for name, (at, dtype) in parts.items()
            if name != "end"
        }
        self.best, self.best_block = tir.local("float32", 1), tir.local("int64", 1)
        tir.store(self.best, 0, tir.f32(float("-inf")))
        tir.store(self.best_block, 0, T.int64(0))
        self._each_block(self._block_maximum)
        self.largest = tir.let(self.best[0])

    def greedy(self, tokens: Any, row: Any) -> None:
        """Store the lowest id of the largest logit to tokens[row]; 0 when there is none above -inf."""
        tir.store(tokens, row, T.int64(0))
        with tir.when(self.largest > tir.f32(float("-inf"))):
            start = tir.let(self.best_block[0] * BLOCK)
            size = tir.let(T.min(T.int64(BLOCK), T.int64(self.vocab) - start))
            with tir.loop(size) as back:
                i = tir.let(start + (size - 1 - back))
                with tir.when(T.EQ(tir.load(self.logits, self.offset + i), self.largest)):
                    tir.store(tokens, row, i)

    def is_finite(self) -> Any:
        """Return whether the largest logit is finite; otherwise the choice is greedy."""
        infinity = tir.f32(float("inf"))
        return T.And(self.largest > tir.f32(float("-inf")), self.largest < infinity)

    def sample_all(self, scale: Any, min_weight: Any, random: tuple[Any, Any], tokens: Any, row: Any) -> None:
        """Sample without top_k and top_p: the sums of the blocks, then one block again."""
        self.scale, self.min_weight = scale, min_weight
        self.total = tir.local("int64", 1)
        tir.store(self.total, 0, T.int64(0))
        self._each_block(self._block_sum)
        target = tir.let(mul_shift31(random, tir.let(self.total[0])))
        before, chosen = tir.local("int64", 1), tir.local("int64", 1)
        running = tir.local("int64", 1)
        tir.store(running, 0, T.int64(0))
        tir.store(chosen, 0, T.int64(-1))
        tir.store(before, 0, T.int64(0))
        with tir.loop(self.space.blocks) as b:
            after = tir.let(running[0] + tir.load(self.parts["sums"], b))
            with tir.when(T.And(chosen[0] < 0, after > target)):
                tir.store(chosen, 0, b)
                tir.store(before, 0, running[0])
            tir.store(running, 0, after)
        start = tir.let(chosen[0] * BLOCK)
        tir.store(running, 0, before[0])
        tir.store(chosen, 0, T.int64(-1))
        with tir.loop(T.min(T.int64(BLOCK), T.int64(self.vocab) - start)) as i:
            w = self._kept(tir.load(self.logits, self.offset + start + i), 1)
            after = tir.let(running[0] + tir.cast(w, "int64"))
            with tir.when(T.And(chosen[0] < 0, after > target)):
                tir.store(chosen, 0, start + i)
            tir.store(running, 0, after)
        tir.store(tokens, row, chosen[0])

    def sample_filtered(
        self,
        scale: Any,
        top_k: Any,
        top_p: Any,
        min_weight: Any,
        random: tuple[Any, Any],
        tokens: Any,
        row: Any,
    ) -> None:
        """Sample with top_k (0: off) and top_p (2^31: off): a histogram cuts, then exact selection."""
        self.scale, self.min_weight = scale, min_weight
        for name, zero in (("mass", T.int64(0)), ("count", T.int32(0))):
            with tir.loop(BINS) as b:
                tir.store(self.parts[name], b, zero)
        few = tir.let(T.And(top_k > 0, top_k <= T.int64(self.space.blocks)))
        with tir.when(few):  # the k-th largest block maximum is a lower bound of the k-th largest logit
            self._maxima_histogram()
        with tir.when(T.Not(few)):
            self._each_block(self._block_histogram)
        cut, total = self._cut(top_k, top_p)
        self.cut = cut
        found = CandidateList(self.parts["ids"], self.parts["keys"], self.parts["weights"], self.lanes)
        self.found = found
        self._each_block(self._block_gather)
        found.pad()
        with tir.when(top_k > 0):
            found.keep_while_fewer(top_k)
        with tir.when(top_p < T.int64(ONE)):
            restricted = found.total()
            kept = tir.let(T.Select(top_k > 0, restricted, total))
            limit = tir.let(mul_shift31((T.int64(0), top_p), kept, up=True))
            found.keep_while_lighter(limit)
        found.drop_below(min_weight)
        target = tir.let(mul_shift31(random, found.total()))
        tir.store(tokens, row, found.locate(target))

    def _each_block(self, visit: Any) -> None:
        """Emit visit(block, vectors) for the whole blocks in a loop, then for the short one."""
        whole = self.vocab // BLOCK
        with tir.loop(whole) as b:
            visit(b, pieces(BLOCK, self.lanes))
        if self.vocab % BLOCK:
            visit(tir.let(T.int64(whole)), pieces(self.vocab % BLOCK, self.lanes))

    def _load(self, start: Any, at: Any, width: int) -> Any:
        return tir.let(tir.load(self.logits, self.offset + start + at, width))

    def _full(self, vectors: list[tuple[int, int]]) -> int:
        return sum(width == self.lanes for _, width in vectors)

    def _block_maximum(self, b: Any, vectors: list[tuple[int, int]]) -> None:
        start, lanes, full = tir.let(b * BLOCK), self.lanes, self._full(vectors)
        side = 4
        accumulators = [tir.Register("float32", lanes) for _ in range(side)]
        for accumulator in accumulators:
            accumulator.set(tir.f32(float("-inf"), lanes))

        def update(at: Any, u: int) -> None:
            x, old = self._load(start, at, lanes), tir.let(accumulators[u].get())
            accumulators[u].set(T.Select(x > old, x, old))  # a NaN never wins

        with tir.loop(full // side) as i:
            for u in range(side):
                update((i * side + u) * lanes, u)
        for v in range(full // side * side, full):
            update(v * lanes, 0)
        parts = [accumulator.get() for accumulator in accumulators]
        held = tir.Register("float32", 1)  # a chain of bound values would be inlined into a tree
        held.set(fold(T.max(T.max(parts[0], parts[1]), T.max(parts[2], parts[3])), T.max))
        for at, width in vectors[full:]:
            for i in range(width):
                x = self._load(start, at + i, 1)
                held.set(T.Select(x > held.get(), x, held.get()))
        largest = tir.let(held.get())
        tir.store(self.parts["maxima"], b, largest)
        with tir.when(largest > self.best[0]):  # strictly: the first block of the largest
            tir.store(self.best, 0, largest)
            tir.store(self.best_block, 0, b)

    def _distance(self, logit: Any, width: int) -> Any:
        """u: how far below the largest logit, in 2^-15 octaves; NaN and -inf give CAP."""
        distance = tir.let((tir.splat(self.largest, width) - logit) * tir.splat(self.scale, width))
        cap = tir.f32(float(CAP), width)
        return tir.let(tir.cast(T.Select(distance < cap, distance, cap), "int32"))

    def _weight(self, u: Any, width: int) -> Any:
        """2^(30 - u / 2^15), every product below 2^31."""
        c = [tir.i32(value, width) for value in EXP2]
        shift = tir.i32(15, width)
        q = tir.let(T.bitwise_and(u, tir.i32((1 << FRACTION_BITS) - 1, width)))
        p = tir.let(c[2] - T.shift_right(c[3] * q, shift))
        p = tir.let(c[1] - T.shift_right(p * q, shift))
        p = tir.let(c[0] - T.shift_right(p * q, shift))
        power = tir.let(tir.i32(1 << WEIGHT_BITS, width) - T.shift_right(p * q, tir.i32(1, width)))
        return tir.let(T.shift_right(power, T.shift_right(u, shift)))

    def _kept(self, logit: Any, width: int) -> Any:
        w = self._weight(self._distance(logit, width), width)
        return tir.let(T.Select(w >= tir.splat(self.min_weight, width), w, tir.i32(0, width)))

    def _is_near(self, b: Any, cut: Any) -> Any:
        """Whether a block holds a logit in a bin up to `cut`."""
        return T.shift_right(self._distance(tir.load(self.parts["maxima"], b), 1), T.int32(BIN_SHIFT)) <= cut

    def _vectors(self, start: Any, vectors: list[tuple[int, int]], visit: Any) -> None:
        """Emit visit(at, width, logits) for the whole vectors in a loop, then for the pieces."""
        full = self._full(vectors)
        if full:
            with tir.loop(full) as v:
                at = tir.let(v * self.lanes)
                visit(at, self.lanes, self._load(start, at, self.lanes))
        for at, width in vectors[full:]:
            visit(T.int64(at), width, self._load(start, at, width))

    def _block_sum(self, b: Any, vectors: list[tuple[int, int]]) -> None:
        start, lanes = tir.let(b * BLOCK), self.lanes
        tir.store(self.parts["sums"], b, T.int64(0))
        with tir.when(self._is_near(b, T.int32(LIVE_BINS - 1))):
            wide, rest = tir.Register("int64", lanes), tir.Register("int64", 1)
            wide.set(tir.splat(T.int64(0), lanes))
            rest.set(T.int64(0))

            def add(at: Any, width: int, logit: Any) -> None:
                w = tir.cast(self._kept(logit, width), "int64")
                if width == lanes:
                    wide.set(wide.get() + w)
                else:
                    rest.set(rest.get() + add_lanes(w))

            self._vectors(start, vectors, add)
            block = tir.let(add_lanes(wide.get()) + rest.get())
            tir.store(self.parts["sums"], b, block)
            tir.store(self.total, 0, self.total[0] + block)

    def _block_histogram(self, b: Any, vectors: list[tuple[int, int]]) -> None:
        start = tir.let(b * BLOCK)
        with tir.when(self._is_near(b, T.int32(LIVE_BINS - 1))):

            def count(at: Any, width: int, logit: Any) -> None:
                u = self._distance(logit, width)
                w = self._weight(u, width)
                held_u, held_w = tir.local("int32", width), tir.local("int32", width)
                tir.store(held_u, 0, T.shift_right(u, tir.i32(BIN_SHIFT, width)))
                tir.store(held_w, 0, w)
                for i in range(width):
                    slot = tir.let(tir.cast(held_u[i], "int64"))
                    tir.store(self.parts["count"], slot, tir.load(self.parts["count"], slot) + 1)
                    mass = tir.load(self.parts["mass"], slot) + tir.cast(held_w[i], "int64")
                    tir.store(self.parts["mass"], slot, mass)

            self._vectors(start, vectors, count)

    def _maxima_histogram(self) -> None:
        with tir.loop(self.space.blocks) as b:
            u = self._distance(tir.load(self.parts["maxima"], b), 1)
            slot = tir.let(tir.cast(T.shift_right(u, T.int32(BIN_SHIFT)), "int64"))
            tir.store(self.parts["count"], slot, tir.load(self.parts["count"], slot) + 1)

    def _cut(self, top_k: Any, top_p: Any) -> tuple[Any, Any]:
        """Return the last bin that may hold a kept token, and the weight of all counted tokens."""
        cut, count, mass = tir.local("int32", 1), tir.local("int64", 1), tir.local("int64", 1)
        total = tir.local("int64", 1)
        for name in (count, mass, total):
            tir.store(name, 0, T.int64(0))
        tir.store(cut, 0, T.int32(-1))
        with tir.loop(LIVE_BINS) as b:
            tir.store(total, 0, total[0] + tir.load(self.parts["mass"], b))
        limit = tir.let(mul_shift31((T.int64(0), top_p), tir.let(total[0]), up=True))
        with tir.loop(LIVE_BINS) as b:
            tir.store(count, 0, count[0] + tir.cast(tir.load(self.parts["count"], b), "int64"))
            tir.store(mass, 0, mass[0] + tir.load(self.parts["mass"], b))
            enough = T.Select(top_k > 0, count[0] >= top_k, mass[0] >= limit)
            with tir.when(T.And(cut[0] < 0, T.Or(enough, T.EQ(b, T.int64(LIVE_BINS - 1))))):
                tir.store(cut, 0, tir.cast(b, "int32"))
        return tir.let(cut[0]), tir.let(total[0])

    def _block_gather(self, b: Any, vectors: list[tuple[int, int]]) -> None:
        start = tir.let(b * BLOCK)
        with tir.when(self._is_near(b, self.cut)):

            def gather(at: Any, width: int, logit: Any) -> None:
                u = self._distance(logit, width)
                bins = tir.let(T.shift_right(u, tir.i32(BIN_SHIFT, width)))
                nearest = bins if width == 1 else tir.intrinsic("int32", "llvm.vector.reduce.smin", bins)
                with tir.when(nearest <= self.cut):
                    raw = tir.let(tir.bits(logit, vector_type("int32", width)))
                    flipped = T.Select(raw < tir.i32(0, width), tir.i32(-(1 << 31), width) - raw, raw)
                    held = [tir.local("int32", width) for _ in range(3)]
                    for buffer, value in zip(held, (bins, flipped, self._weight(u, width)), strict=True):
                        tir.store(buffer, 0, value)
                    for i in range(width):
                        token = tir.cast(start + at + i, "int32")
                        self.found.append(held[0][i] <= self.cut, token, held[1][i], held[2][i])

            self._vectors(start, vectors, gather)


def add_lanes(value: Any) -> Any:
    """Return the sum of the lanes of an int64 vector."""
    return value if tir.lanes_of(value) == 1 else tir.intrinsic("int64", "llvm.vector.reduce.add", value)


def random_bits(seed: Any, step: Any, row: Any) -> tuple[Any, Any]:
    """Return the draw for (seed, step, row) as two int64 of 31 bits, the high one first."""
    return philox_pair(seed, step, row)
