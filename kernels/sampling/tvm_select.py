"""Exact integer pieces of sampling: the generator, fixed-point products, and selection in a short list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..shared import tir
from ..shared.tir import T
from .workspace import PAD


def philox_pair(seed: Any, step: Any, row: Any) -> tuple[Any, Any]:
    """Return the first two words of Philox4x32-10 without their lowest bits, as int64."""

    def words(value: Any) -> tuple[Any, Any]:
        wide = tir.bits(value, "uint64")
        return tir.let(tir.cast(wide, "uint32")), tir.let(
            tir.cast(T.shift_right(wide, T.uint64(32)), "uint32")
        )

    (k0, k1), (c0, c1), (c2, _) = words(seed), words(step), words(row)
    c3: Any = T.uint32(0)
    for _ in range(10):
        low = tir.let(tir.cast(c0, "uint64") * T.uint64(0xD2511F53))
        high = tir.let(tir.cast(c2, "uint64") * T.uint64(0xCD9E8D57))
        top = lambda v: tir.cast(T.shift_right(v, T.uint64(32)), "uint32")  # noqa: E731
        c0 = tir.let(T.bitwise_xor(T.bitwise_xor(top(high), c1), k0))
        c2 = tir.let(T.bitwise_xor(T.bitwise_xor(top(low), c3), k1))
        c1, c3 = tir.let(tir.cast(high, "uint32")), tir.let(tir.cast(low, "uint32"))
        k0, k1 = tir.let(k0 + T.uint32(0x9E3779B9)), tir.let(k1 + T.uint32(0xBB67AE85))
    first, second = (tir.let(tir.cast(T.shift_right(c, T.uint32(1)), "int64")) for c in (c0, c1))
    return first, second


def mul_shift31(factor: tuple[Any, Any], value: Any, up: bool = False) -> Any:
    """Return factor * value / 2^62 of a 62-bit fraction (high, low), or low * value / 2^31 rounded up.

    value < 2^50. Rounded down, no product reaches 2^63: value is cut at 31 bits too.
    """
    high, low = factor
    top = tir.let(T.shift_right(value, T.int64(31)))
    rest = tir.let(T.bitwise_and(value, T.int64((1 << 31) - 1)))
    if up:
        return low * top + T.shift_right(low * rest + T.int64((1 << 31) - 1), T.int64(31))
    middle = high * rest + low * top + T.shift_right(low * rest, T.int64(31))
    return high * top + T.shift_right(middle, T.int64(31))


class CandidateList:
    """Emit the handling of the tokens that are left: ids in order, keys ordered as the logits, weights."""

    def __init__(self, ids: Any, keys: Any, weights: Any, lanes: int) -> None:
        self.ids, self.keys, self.weights, self.lanes = ids, keys, weights, lanes
        self.length = tir.local("int64", 1)
        tir.store(self.length, 0, T.int64(0))

    def append(self, condition: Any, token: Any, key: Any, weight: Any) -> None:
        """Add a token if the condition holds (written in any case, without a branch)."""
        at = tir.let(self.length[0])
        for buffer, value in ((self.ids, token), (self.keys, key), (self.weights, weight)):
            tir.store(buffer, at, value)
        tir.store(self.length, 0, at + tir.cast(condition, "int64"))

    def pad(self) -> None:
        """Fill up to whole vectors with entries that count nothing."""
        with tir.loop(PAD) as i:
            at = tir.let(self.length[0] + i)
            tir.store(self.keys, at, T.int32(-(1 << 31)))
            tir.store(self.weights, at, T.int32(0))

    def total(self) -> Any:
        """Return the sum of the weights."""
        return self._sum(lambda keys, weights: tir.cast(weights, "int64"))

    def keep_while_fewer(self, limit: Any) -> None:
        """Keep the tokens with fewer than `limit` larger logits in the list."""
        one, zero = tir.splat(T.int64(1), self.lanes), tir.splat(T.int64(0), self.lanes)
        self._keep(limit, lambda above, weights: T.Select(above, one, zero))

    def keep_while_lighter(self, limit: Any) -> None:
        """Keep the tokens whose larger logits weigh less than `limit` together."""
        zero = tir.i32(0, self.lanes)
        self._keep(limit, lambda above, weights: tir.cast(T.Select(above, weights, zero), "int64"))

    def drop_below(self, smallest: Any) -> None:
        """Drop tokens whose weight is below `smallest`."""
        self._compact(lambda key, weight: weight >= smallest)

    def locate(self, target: Any) -> Any:
        """Return the first id where the running sum of weights exceeds `target`."""
        running, token = tir.local("int64", 1), tir.local("int64", 1)
        tir.store(running, 0, T.int64(0))
        tir.store(token, 0, T.int64(-1))
        with tir.loop(tir.let(self.length[0])) as i:
            after = tir.let(running[0] + tir.cast(tir.load(self.weights, i), "int64"))
            with tir.when(T.And(token[0] < 0, after > target)):
                tir.store(token, 0, tir.cast(tir.load(self.ids, i), "int64"))
            tir.store(running, 0, after)
        return tir.let(token[0])

    def _keep(self, limit: Any, term: Callable[[Any, Any], Any]) -> None:
        """Bisect the smallest key t whose larger keys sum below `limit`; drop the keys below t."""
        low, high = tir.local("int64", 1), tir.local("int64", 1)
        tir.store(low, 0, T.int64(-(1 << 31)))
        tir.store(high, 0, T.int64((1 << 31) - 1))
        with T.While(low[0] < high[0]):
            middle = tir.let(T.shift_right(low[0] + high[0], T.int64(1)))
            key = tir.let(tir.cast(middle, "int32"))
            above = tir.splat(key, self.lanes)
            held = self._sum(lambda keys, weights: term(keys > above, weights))
            fits = tir.let(held < limit)
            tir.store(high, 0, T.Select(fits, middle, high[0]))
            tir.store(low, 0, T.Select(fits, low[0], middle + 1))
        threshold = tir.let(tir.cast(high[0], "int32"))
        self._compact(lambda key, weight: key >= threshold)

    def _sum(self, term: Callable[[Any, Any], Any]) -> Any:
        """Return the sum of term(keys, weights), a vector of int64."""
        lanes = self.lanes
        wide = tir.Register("int64", lanes)
        wide.set(tir.splat(T.int64(0), lanes))
        vectors = tir.let(T.truncdiv(self.length[0] + (lanes - 1), T.int64(lanes)))
        with tir.loop(vectors) as v:
            keys = tir.let(tir.load(self.keys, v * lanes, lanes))
            weights = tir.let(tir.load(self.weights, v * lanes, lanes))
            wide.set(wide.get() + term(keys, weights))
        return tir.let(tir.intrinsic("int64", "llvm.vector.reduce.add", wide.get()))

    def _compact(self, condition: Callable[[Any, Any], Any]) -> None:
        before = tir.let(self.length[0])
        tir.store(self.length, 0, T.int64(0))
        with tir.loop(before) as i:
            token, key, weight = (tir.let(tir.load(b, i)) for b in (self.ids, self.keys, self.weights))
            self.append(tir.let(condition(key, weight)), token, key, weight)
        self.pad()
