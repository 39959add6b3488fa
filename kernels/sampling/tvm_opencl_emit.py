"""The kernels of sampling on an OpenCL device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..shared import device_tir as d
from .spec import CAP, EXP2, FRACTION_BITS, WEIGHT_BITS, SamplingSpec

_LOWEST = -3.4028234663852886e38
_LARGEST = 3.4028234663852886e38


def penalize(spec: SamplingSpec, lanes: int) -> Any:
    """Grid (tokens / lanes, rows): y[token] from the logit, so a token twice in the history changes once."""
    args = [("logits", "*float32"), ("history", "*int32"), ("y", "*float32"), ("count", "int32")]
    k = d.DeviceKernel("penalize", [*args, ("penalty", "float32")], lanes)
    i, row = d.let(k.group[0] * lanes + k.lane), k.group[1]
    with d.when(i < k["count"]):
        token = d.let(k["history"][row * k["count"] + i])
        with d.when(d.both(token >= 0, token < spec.vocab_size)):
            at = d.let(row * spec.vocab_size + token)
            value = d.let(k["logits"][at])
            d.store(k["y"], at, d.choose(value < 0.0, value * k["penalty"], value / k["penalty"]))
    return k.finish()


def greedy(spec: SamplingSpec, lanes: int) -> Any:
    """Grid (rows): the lowest id of the largest logit; NaN counts as -inf."""
    k = d.DeviceKernel("greedy", [("logits", "*float32"), ("token", "*int32")], lanes)
    _, token = _largest(spec, k)
    with d.when(k.lane == 0):
        d.store(k["token"], k.group[0], token)
    return k.finish()


def _largest(spec: SamplingSpec, k: Any) -> tuple[Any, Any]:
    """Return the row's largest logit and its lowest id (0 when all are -inf), in every lane."""
    values, ids = d.local_memory("float32", k.lanes), d.local_memory("int32", k.lanes)
    best, token = d.Register("float32", d.f32(_LOWEST)), d.Register("int32", d.i32(spec.vocab_size))
    with d.strided(k, spec.vocab_size) as i:
        value = d.let(k["logits"][k.group[0] * spec.vocab_size + i])
        with d.when(value > best.get()):
            best.set(value)
            token.set(i)
    d.store(values, k.lane, best.get())
    d.store(ids, k.lane, token.get())
    half = k.lanes // 2
    d.barrier()
    while half:
        with d.when(k.lane < half):
            a, b = d.let(values[k.lane]), d.let(values[k.lane + half])
            x, y = d.let(ids[k.lane]), d.let(ids[k.lane + half])
            with d.when(d.one_of(b > a, d.both(b == a, y < x))):
                d.store(values, k.lane, b)
                d.store(ids, k.lane, y)
        d.barrier()
        half //= 2
    largest, found = d.let(values[0]), d.let(ids[0])
    d.barrier()
    return largest, d.let(d.choose(found < spec.vocab_size, found, d.i32(0)))


def draw(spec: SamplingSpec, lanes: int) -> Any:
    """Grid (rows): temperature, top_k (0: off), top_p in 2^-31 (0: off), least weight that is kept."""
    args = [("logits", "*float32"), ("token", "*int32"), ("draws", "*int32"), ("scale", "float32")]
    args += [(n, "int32") for n in ("top_k", "top_p", "min_weight")]
    k = d.DeviceKernel("draw", args, lanes)
    largest, likeliest = _largest(spec, k)
    sums, wanted_sum = d.local_memory("int64", lanes), d.local_memory("int64", 1)
    share = -(-spec.vocab_size // lanes)  # ids of a lane, side by side, so that running sums are in order
    logit = lambda i: k["logits"][k.group[0] * spec.vocab_size + i]  # noqa: E731

    def total(term: Callable[[Any], Any]) -> Any:
        """Return the sum of term(id) int64 over the row, in every lane."""
        acc = d.Register("int64", d.i64(0))
        with d.strided(k, spec.vocab_size) as i:
            acc.add(term(i))
        d.store(sums, k.lane, acc.get())
        d.fold(k, sums, d.add)
        found = d.let(sums[0])
        d.barrier()
        return found

    weigh = lambda i: _weight(logit(i), largest, k["scale"])  # noqa: E731
    key = lambda i: _order(logit(i))  # noqa: E731
    cut = d.Register("uint32", d.u32(0))  # the order of the smallest logit that is kept
    with d.when(k["top_k"] > 0):
        _bisect(
            cut,
            lambda c: (
                total(lambda i: d.choose(key(i) >= c, d.i64(1), d.i64(0))) >= d.cast(k["top_k"], "int64")
            ),
        )
    top_k_cut = d.let(cut.get())
    kept = lambda i: d.choose(key(i) >= top_k_cut, weigh(i), d.i64(0))  # noqa: E731
    low = d.Register("uint32", d.u32(0))
    with d.when(k["top_p"] > 0):
        everything = total(kept)
        limit = d.let(_ceiling(everything, d.cast(k["top_p"], "int64")))
        # the largest order whose logits still have so much weight at or above them
        _bisect(low, lambda c: total(lambda i: d.choose(key(i) >= c, kept(i), d.i64(0))) >= limit)
    floor = d.let(d.maximum(top_k_cut, low.get()))

    def final(i: Any) -> Any:
        value = d.let(weigh(i))
        there = d.both(key(i) >= floor, value >= d.cast(k["min_weight"], "int64"))
        return d.choose(there, value, d.i64(0))

    mine = d.Register("int64", d.i64(0))
    with d.loop(share) as j:
        i = d.let(k.lane * share + j)
        with d.when(i < spec.vocab_size):
            mine.add(final(i))
    d.store(sums, k.lane, mine.get())
    d.barrier()
    with d.when(k.lane == 0):  # running sums of the lanes before
        run = d.Register("int64", d.i64(0))
        with d.loop(lanes) as j:
            own = d.let(sums[j])
            d.store(sums, j, run.get())
            run.add(own)
        at = k.group[0] * 2
        d.store(k["token"], k.group[0], likeliest)
        goal = _target(run.get(), d.cast(k["draws"][at], "int64"), d.cast(k["draws"][at + 1], "int64"))
        d.store(wanted_sum, 0, goal)
    d.barrier()
    with d.when(largest <= _LARGEST):  # +inf: greedy
        wanted, before = d.let(wanted_sum[0]), d.Register("int64", d.let(sums[k.lane]))
        with d.when(d.both(before.get() <= wanted, before.get() + mine.get() > wanted)), d.loop(share) as j:
            i = d.let(k.lane * share + j)
            with d.when(i < spec.vocab_size):
                after = d.let(before.get() + final(i))
                with d.when(d.both(before.get() <= wanted, after > wanted)):
                    d.store(k["token"], k.group[0], i)
                before.set(after)
    return k.finish()


def _bisect(found: Any, holds: Callable[[Any], Any]) -> None:
    """Set `found` to the largest uint32 for which `holds` (true below, false above)."""
    bit = d.Register("uint32", d.u32(1 << 31))
    with d.loop(32):
        tried = d.let(d.either(found.get(), bit.get()))
        with d.when(holds(tried)):
            found.set(tried)
        bit.set(d.shift(bit.get(), 1))


def _order(value: Any) -> Any:
    """Return bits that order floats as their values do; NaN as -inf, -0 as 0."""
    clean = d.let(d.choose(value == value, value + d.f32(0.0), d.f32(_LOWEST)))
    raw = d.let(d.as_bits(clean, "uint32"))
    return d.let(d.choose(d.as_bits(raw, "int32") < 0, d.invert(raw), d.either(raw, d.u32(1 << 31))))


def _weight(value: Any, largest: Any, scale: Any) -> Any:
    """Return w int64, 2^30 for the largest logit; see reference.py."""
    distance = d.let((largest - value) * scale)
    u = d.let(d.cast(d.choose(distance < d.f32(float(CAP)), distance, d.f32(float(CAP))), "int64"))
    octaves, q = d.shift64(u, FRACTION_BITS), d.let(d.mask64(u, FRACTION_BITS))
    c1, c2, c3, c4 = (d.i64(c) for c in EXP2)
    inner = c3 - d.shift64(c4 * q, 15)
    inner = c2 - d.shift64(inner * q, 15)
    inner = c1 - d.shift64(inner * q, 15)
    return d.let(d.shift64(d.i64(1 << WEIGHT_BITS) - d.shift64(inner * q, 1), octaves))


def _ceiling(total: Any, part: Any) -> Any:
    """Return ceil(total * part / 2^31) for total < 2^50 and part < 2^31, in 64 bits."""
    high, low = d.let(d.shift64(total, 31)), d.let(d.mask64(total, 31))
    return high * part + d.shift64(low * part + d.i64((1 << 31) - 1), 31)


def _target(total: Any, high: Any, low: Any) -> Any:
    """Return floor((high * 2^31 + low) * total / 2^62) in 64 bits."""
    a, b = d.let(d.shift64(total, 31)), d.let(d.mask64(total, 31))
    middle = high * b + low * a + d.shift64(low * b, 31)
    return high * a + d.shift64(middle, 31)
