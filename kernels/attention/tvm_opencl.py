"""Attention over the `vectors` cache of an OpenCL device, with an online softmax; fp32 throughout.

A work-group has some query heads of one key-value head, times some queries: its rows. A tile has as many
keys as the group has lanes: each lane scores one key for all rows, then lanes take 16 bytes of values each.
One query over a long cache would occupy few work-groups: `split` shares its tiles out and leaves sums over
some of them, which `combine` adds.
"""

from __future__ import annotations

from typing import Any

from ..shared import device_tir as d
from .opencl import heads_of, queries_of
from .spec import AttentionSpec
from .vectors import KEYS, elements

_LOW = -3.0e38  # below every score
NUMBERS = ("tokens", "position", "q_st", "slots", "window")
SHARE = ("splits", "tiles_each")  # of `split` alone


def lower(spec: AttentionSpec, configuration: Any, target: Any) -> list[Any]:
    """Return the kernels `decode` (one query a work-group), `split` and `combine`, and `prefill`."""
    lanes = configuration["lanes"]
    return [
        _kernel(spec, "decode", 1, lanes),
        _kernel(spec, "split", 1, lanes, split=True),
        _combine(spec, lanes),
        _kernel(spec, "prefill", queries_of(spec), lanes),
    ]


class _Rows:
    """What a work-group knows of its rows: which head and query each is, and its running softmax."""

    def __init__(self, spec: AttentionSpec, k: d.DeviceKernel, queries: int, split: bool) -> None:
        self.heads = heads_of(spec)
        self.count = self.heads * queries
        per_kv, groups = spec.group // self.heads, spec.num_heads // self.heads
        self.sequence = d.let(d.divide(k.group[1], groups))
        group = d.let(d.remainder(k.group[1], groups))
        self.first_query = d.let(d.i32(0) if split else k.group[0] * queries)
        self.kv_head = d.let(d.divide(group, per_kv))
        first = self.kv_head * spec.group + d.remainder(group, per_kv) * self.heads
        self.head = [d.let(first + i % self.heads) for i in range(self.count)]
        self.query = [d.let(self.first_query + i // self.heads) for i in range(self.count)]
        self.top = [d.Register("float32", d.f32(_LOW)) for _ in range(self.count)]
        self.total = [d.Register("float32", d.f32(0.0)) for _ in range(self.count)]

    def fours(self, values: list[Any], other: float) -> list[Any]:
        """Return values of the rows as vectors, filled up."""
        values = values + [d.f32(other)] * (-len(values) % 4)
        return [d.vector(values[i : i + 4]) for i in range(0, len(values), 4)]


def _kernel(spec: AttentionSpec, name: str, queries: int, lanes: int, split: bool = False) -> Any:
    """Grid (query blocks, sequences * groups of heads); (splits, the same) where tiles are shared out."""
    e, dim = elements(spec.kv_dtype), spec.head_dim
    args = [("q", "*float32"), ("k", "*uint32x4"), ("v", "*uint32x4"), ("k_scale", "*float32"),
            ("v_scale", "*float32"), ("pads", "*int32"), ("out", "*float32x4")]  # fmt: skip
    args += [(n, "int32") for n in NUMBERS] + [("scale", "float32"), ("softcap", "float32")]
    args += [(n, "int32") for n in SHARE] if split else []
    k = d.DeviceKernel(name, args, lanes)
    rows = _Rows(spec, k, queries, split)
    chunks, sequence = dim // e, rows.sequence
    keys_at_once = lanes // chunks
    q = d.local_memory("float32", rows.count * dim)
    weights = d.local_memory("float32", rows.count * lanes)
    memory = d.local_memory("float32x4", lanes)
    acc = [[d.Register("float32x4", d.f32(0.0, 4)) for _ in range(e // 4)] for _ in range(rows.count)]
    for i in range(rows.count):
        query = d.let(d.minimum(rows.query[i], k["tokens"] - 1))
        at = d.let((sequence * k["tokens"] + query) * k["q_st"] + rows.head[i] * dim)
        with d.strided(k, dim) as j:
            d.store(q, i * dim + j, k["q"][at + j] * k["scale"])
    d.barrier()
    last = d.minimum(rows.first_query + queries, k["tokens"])
    end = d.let(k["position"] + last)  # keys that any row sees
    begin = d.let(k["pads"][sequence])
    if spec.window:
        begin = d.let(d.maximum(begin, k["position"] + rows.first_query - k["window"] + 1))
    first_tile = d.let(d.divide(d.maximum(begin, d.i32(0)), lanes))
    tiles = d.let(d.truncated_division(end + (lanes - 1), d.i32(lanes)) - first_tile)
    if split:
        before = d.let(k.group[0] * k["tiles_each"])
        first_tile, tiles = d.let(first_tile + before), d.let(d.minimum(k["tiles_each"], tiles - before))
    cache = d.let(sequence * spec.num_kv_heads + rows.kv_head)  # which part of the cache
    lane_key, lane_chunk = d.let(d.divide(k.lane, chunks)), d.let(d.remainder(k.lane, chunks))
    with d.loop(d.maximum(tiles, d.i32(0))) as t:
        start = d.let((first_tile + t) * lanes)
        key = d.let(start + k.lane)
        scores = _scores(spec, k, rows, q, cache, key, end, chunks)
        _softmax(spec, k, rows, scores, key, memory, weights, acc)
        with d.when(lane_key < keys_at_once), d.loop(-(-lanes // keys_at_once)) as turn:
            j = d.let(turn * keys_at_once + lane_key)
            with d.when(d.both(j < lanes, start + j < end)):
                place = d.let(cache * k["slots"] + start + j)
                values = _decode(spec, k["v"][place * chunks + lane_chunk], k["v_scale"], place)
                for i in range(rows.count):
                    weight = d.let(d.splat(weights[i * lanes + j]))
                    for part, value in enumerate(values):
                        acc[i][part].add(weight * value)
        d.barrier()
    _write(spec, k, rows, memory, acc, keys_at_once, chunks, split)
    return k.finish()


def _combine(spec: AttentionSpec, lanes: int) -> Any:
    """Grid (heads of all sequences * vectors of one / lanes, 1): a work-item has four elements of a head.

    `numbers` are the same memory as `parts`.
    """
    args = [("parts", "*float32x4"), ("numbers", "*float32"), ("out", "*float32x4")]
    args += [("count", "int32"), ("splits", "int32")]
    k = d.DeviceKernel("combine", args, lanes)
    quads = spec.head_dim // 4
    item = d.let(k.group[0] * lanes + k.lane)
    with d.when(item < k["count"]):
        row, quad = d.let(d.divide(item, quads)), d.let(d.remainder(item, quads))
        top, total = d.Register("float32", d.f32(_LOW)), d.Register("float32", d.f32(0.0))
        acc = d.Register("float32x4", d.f32(0.0, 4))
        with d.loop(k["splits"]) as i:
            start = d.let((row * k["splits"] + i) * (quads + 1))
            own = d.let(k["numbers"][(start + quads) * 4])
            largest = d.let(d.maximum(top.get(), own))
            old, new = d.let(d.exp(top.get() - largest)), d.let(d.exp(own - largest))
            total.set(total.get() * old + k["numbers"][(start + quads) * 4 + 1] * new)
            acc.set(acc.get() * d.splat(old) + k["parts"][start + quad] * d.splat(new))
            top.set(largest)
        sum_of_weights = d.let(total.get())
        inverse = d.let(d.choose(sum_of_weights > 0.0, d.f32(1.0) / sum_of_weights, d.f32(0.0)))
        d.store(k["out"], item, acc.get() * d.splat(inverse))
    return k.finish()


def _scores(
    spec: AttentionSpec, k: Any, rows: _Rows, q: Any, cache: Any, key: Any, end: Any, chunks: int
) -> list[Any]:
    """Return the registers of this lane's key's scores, one a row."""
    scores = [d.Register("float32", d.f32(0.0)) for _ in range(rows.count)]
    with d.when(key < end):
        place = d.let(cache * k["slots"] + key)
        block = d.let(d.divide(place, KEYS) * (chunks * KEYS) + d.remainder(place, KEYS))
        with d.loop(chunks) as c:
            values = _decode(spec, k["k"][block + c * KEYS], k["k_scale"], place)
            for i, score in enumerate(scores):
                for part, value in enumerate(values):
                    at = i * spec.head_dim + c * (4 * len(values)) + part * 4
                    score.add(d.sum_of(d.let(d.load4(q, at) * value)))
        if spec.softcap:
            for score in scores:
                score.set(d.tanh(score.get() / k["softcap"]) * k["softcap"])
    return scores


def _softmax(
    spec: AttentionSpec, k: Any, rows: _Rows, scores: list[Any], key: Any, memory: Any, weights: Any,
    acc: list[Any],
) -> None:  # fmt: skip
    """Write the tile's weights exp(score - largest), and scale what was summed before."""
    seen = []
    for i in range(rows.count):
        place = k["position"] + rows.query[i]
        rule = d.both(key <= place, key >= k["pads"][rows.sequence])
        if spec.window:
            rule = d.both(rule, place - key < k["window"])
        seen.append(d.let(rule))
    masked = [d.choose(s, score.get(), d.f32(_LOW)) for s, score in zip(seen, scores)]
    for n, four in enumerate(rows.fours(masked, _LOW)):
        d.store(memory, k.lane, four)
        d.fold(k, memory, d.maximum)
        found = d.let(memory[0])
        for i in range(4 * n, min(4 * n + 4, rows.count)):
            top = d.let(d.maximum(rows.top[i].get(), d.lane_of(found, i % 4)))
            old = d.let(d.exp(rows.top[i].get() - top))
            weight = d.let(d.choose(seen[i], d.exp(scores[i].get() - top), d.f32(0.0)))
            rows.total[i].set(rows.total[i].get() * old + weight)
            rows.top[i].set(top)
            d.store(weights, i * k.lanes + k.lane, weight)
            for part in acc[i]:
                part.set(part.get() * d.splat(old))
        d.barrier()


def _decode(spec: AttentionSpec, words: Any, scales: Any, place: Any) -> list[Any]:
    """Return 16 bytes of a key or value as float32x4."""
    words = d.let(words)
    if spec.kv_dtype == "float32":
        return [d.let(d.as_bits(words, "float32x4"))]
    parts = [d.lane_of(words, i) for i in range(4)]
    if spec.kv_dtype == "int8":
        scale = d.let(d.splat(scales[place]))
        return [d.let(d.vector([d.byte_of(w, b, signed=True) for b in range(4)]) * scale) for w in parts]
    convert = d.from_half if spec.kv_dtype == "float16" else d.from_bfloat16
    values = [convert(h) for w in parts for h in d.halves(w)]
    return [d.let(d.vector(values[:4])), d.let(d.vector(values[4:]))]


def _write(
    spec: AttentionSpec, k: Any, rows: _Rows, memory: Any, acc: list[Any], keys_at_once: int, chunks: int,
    split: bool,
) -> None:  # fmt: skip
    """Add what the lanes hold and write out[sequence * tokens + query, head, :].

    With `split` write out[sequence * heads + head, split, :], not divided, and behind it (top, total, 0, 0).
    """
    totals = []
    for four in rows.fours([t.get() for t in rows.total], 0.0):
        d.store(memory, k.lane, four)
        d.fold(k, memory, d.add)
        totals.append(d.let(memory[0]))
        d.barrier()
    quads = spec.head_dim // 4
    for i in range(rows.count):
        total = d.let(d.lane_of(totals[i // 4], i % 4))
        inverse = d.let(d.choose(total > 0.0, d.f32(1.0) / total, d.f32(0.0)))
        row = (rows.sequence * k["tokens"] + rows.query[i]) * spec.num_heads + rows.head[i]
        first = d.let((row * k["splits"] + k.group[0]) * (quads + 1) if split else row * quads)
        for part, register in enumerate(acc[i]):
            d.store(memory, k.lane, register.get())
            d.barrier()
            with d.when(d.both(k.lane < chunks, rows.query[i] < k["tokens"])):
                found = d.Register("float32x4", d.f32(0.0, 4))
                with d.loop(keys_at_once) as j:
                    found.add(memory[j * chunks + k.lane])
                at = first + k.lane * len(acc[i]) + part
                d.store(k["out"], at, found.get() if split else found.get() * d.splat(inverse))
            d.barrier()
        if split:
            with d.when(k.lane < 1):
                state = d.vector([rows.top[i].get(), total, d.f32(0.0), d.f32(0.0)])
                d.store(k["out"], first + quads, state)
