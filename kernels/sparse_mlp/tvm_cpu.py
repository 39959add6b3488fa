"""The CPU form: gates of all neurons, a list of the blocks that fire, then up and down of those only.

Where nearly all blocks fired for the last row of one, gates and ups are read in one pass as the dense product
reads them, and only down is sparse: two passes over the pair would cost more than they save.
Weights stay in the layout of the dense product: a block of 32 gate (or up) rows is one run of bytes, and a
group of the down weight is one run in every block of 32 output rows. Prefetches follow the list.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...compiler.target import Target
from ..quant_matmul.packing import BLOCK
from ..quant_matmul.tvm_cpu import prepare_row
from ..quant_matmul.tvm_cpu_context import Context, finish_vector, row_tiles, shared_range, stream_of
from ..quant_matmul.tvm_cpu_rows import quantize_group
from ..quant_matmul.tvm_cpu_stream import Prefetch, Stream
from ..quant_matmul.tvm_cpu_tiles import Activations, Tile, float_tile, int_tile
from ..shared import tir
from ..shared.isa.table import Isa, by_name
from ..shared.math import fold, sigmoid, silu
from ..shared.tir import T
from .spec import SparseMlpSpec

ARGUMENTS = (
    "m", "threads", "one", "x", "gate_up", "down", "y", "threshold", "listed", "count", "dense_from", "state",
    "x_codes", "x_scales", "x_sums", "gates", "h_codes", "h_scales", "h_sums", "flags",
)  # fmt: skip


def lower(spec: SparseMlpSpec, configuration: Mapping[str, Any], target: Target) -> list[Any]:
    """Return the PrimFuncs `sparse_1` (one row) and `sparse_n` (any number, some at a time)."""
    isa = by_name(str(configuration.get("isa") or target.isa))
    rows = int(configuration["small_rows"])
    return [
        SparseMlp("sparse_1", spec, isa, 1, Prefetch.of(configuration, 1)).emit(),
        SparseMlp("sparse_n", spec, isa, rows, Prefetch.of(configuration, rows)).emit(),
    ]


@dataclass
class _BlockStream(Stream):
    """A block of gate or up rows; past its end prefetches go on at the block that is read next."""

    following: Any = None

    def _ahead_at(self, offset: Any) -> Any:
        past = offset - self.geometry.block_bytes
        return T.Select(past < 0, self.at + offset, self.following + past)


@dataclass
class _ListedStream(Stream):
    """A block of down rows of which only the listed groups are read; prefetches follow the list."""

    listed: Any = None
    count: Any = None
    per_block: int = 1

    @contextlib.contextmanager
    def each_group(self, ahead: Prefetch, vectors: Sequence[int]) -> Iterator[Any]:
        g = self.geometry
        distance = -(-ahead.distance // g.group_bytes)
        total = tir.let(self.count * self.per_block)
        with tir.loop(total) as i:
            group = tir.let(self._group(i))
            if distance:
                later = tir.let(i + distance)
                past = later >= total  # then the first groups of the next block of rows
                where = tir.let(self._group(T.min(T.Select(past, later - total, later), total - 1)))
                base = tir.let(
                    self.at + T.Select(past, T.int64(g.block_bytes), T.int64(0)) + where * g.group_bytes
                )
                for line in range(0, g.group_bytes, 64):
                    tir.prefetch(self.views["u8"], base + line, ahead.locality)
            yield group

    def _group(self, i: Any) -> Any:
        if self.per_block == 1:
            return tir.cast(tir.load(self.listed, i), "int64")
        entry = tir.cast(tir.load(self.listed, T.truncdiv(i, T.int64(self.per_block))), "int64")
        return entry * self.per_block + T.truncmod(i, T.int64(self.per_block))


class SparseMlp:
    """Emitter of one function; `rows` rows pass a weight block together."""

    def __init__(self, name: str, spec: SparseMlpSpec, isa: Isa, rows: int, prefetch: Prefetch) -> None:
        self.name, self.spec, self.isa, self.rows, self.prefetch = name, spec, isa, rows, prefetch
        self.per_block = spec.block // BLOCK
        self.vectors = BLOCK // isa.lanes if rows == 1 else min(isa.small_vectors, BLOCK // isa.lanes)
        self.may_fuse = rows == 1 and spec.select == "threshold"

    def emit(self) -> Any:
        """Return the PrimFunc."""
        x_type = "*" + self.spec.x_dtype
        types = dict.fromkeys(ARGUMENTS, "int64") | {"x": x_type, "y": x_type, "threshold": "float32"}
        types |= {"listed": "*int32", "flags": "*int32", "state": "*int32", "gates": "*float32"}
        types |= {"x_scales": "*float32", "h_scales": "*float32"}
        k = self.kernel = tir.Kernel(self.name, [(name, types[name]) for name in ARGUMENTS])
        pair, down = self.spec.products()
        self.pair = self._context(pair, "gate_up", "x")
        self.down = self._context(down, "down", "h")
        with tir.loop(row_tiles(self.pair) * self.rows) as row:
            prepare_row(self.pair, row)
        self.active, self.fused = tir.Register("int64", 1), tir.Register("int64", 1)
        self.active.set(k["count"])
        self.fused.set(T.int64(0))
        if self.may_fuse:
            with tir.when(tir.cast(tir.load(k["state"], 0), "int64") >= k["dense_from"]):
                self.fused.set(T.int64(1))
        fused = tir.let(self.fused.get())
        if self.spec.select == "threshold":
            with tir.parallel(k["threads"]) as thread:
                self._gates(thread, fused)
            self._list(fused)
        count = tir.let(self.active.get())
        with tir.parallel(k["threads"]) as thread:
            self._hidden(thread, count, fused)
        with tir.parallel(k["threads"]) as thread:
            self._down(thread, count)
        return k.finish()

    def _context(self, problem: Any, weight: str, source: str) -> Context:
        k = self.kernel
        names = {"codes": f"{source}_codes", "scales": f"{source}_scales", "sums": f"{source}_sums"}
        fields = {name: k[own] for name, own in names.items()} | {"w": k[weight], "x": k["x"], "y": k["y"]}
        fields |= {name: k[name] for name in ("m", "threads", "one")}
        return Context(self.isa, problem, fields, self.rows, self.vectors)

    def _tiles(self) -> Iterator[int]:
        """Yield the first vector of each tile of a block of 32 columns."""
        return iter(range(0, BLOCK // self.isa.lanes, self.vectors))

    def _compute(self, c: Context, stream: Stream, first: int, row0: Any) -> Tile:
        """Emit a tile's products and return it."""
        tile = Tile(self.isa, self.rows, self.vectors)
        if c.integer:
            out = c.row_outputs(False)
            act = Activations(tir.buffer_at(c.kernel["codes"], "int32"), None, out["sa"], out["sc"], row0)
            ahead = self.prefetch if first == 0 else Prefetch()
            int_tile(stream, act, tile, first, c.kernel["one"], prefetch=ahead)
        else:
            float_tile(stream, tir.buffer_at(c.kernel["codes"], "float32"), row0, c.k_padded, tile, first)
        return tile

    def _pair_stream(self, unit: Any, part: int, following: Any) -> Stream:
        """Return block `unit` of gate (part 0) or up (1); `following` is read after it."""
        plain, size = stream_of(self.pair, unit * 2 + part), self.pair.geometry.block_bytes
        return _BlockStream(
            self.isa, plain.spec, plain.views, plain.at, tir.let((following * 2 + part) * size)
        )

    def _gates(self, thread: Any, fused: Any) -> None:
        """Phase 1: act(gate), or h where `fused`, of a share of all neurons, and which blocks of 32 fire."""
        k, lanes = self.kernel, self.isa.lanes
        first, last = shared_range(T.int64(self.spec.neurons // BLOCK), thread, k["threads"])
        with tir.loop(tir.let(last - first)) as i:
            unit = tir.let(first + i)
            fired = tir.Register("int32", lanes)
            fired.set(tir.i32(0, lanes))
            with tir.loop(row_tiles(self.pair)) as t:
                row0 = tir.let(t * self.rows)
                for v0 in self._tiles():
                    tile = self._compute(self.pair, self._pair_stream(unit, 0, unit + 1), v0, row0)
                    if self.may_fuse:
                        with tir.when(fused > 0):
                            up = self._compute(self.pair, self._pair_stream(unit, 1, unit + 1), v0, row0)
                            self._store_gates(tile, row0, 0, unit, v0, fired, up)
                    for r in range(self.rows):
                        with tir.when(T.And(row0 + r < k["m"], fused < 1)):
                            self._store_gates(tile, row0 + r, r, unit, v0, fired)
            tir.store(k["flags"], unit, fold(fired.get(), T.max))

    def _store_gates(
        self, tile: Tile, row: Any, r: int, unit: Any, v0: int, fired: Any, up: Tile | None = None
    ) -> None:
        lanes = self.isa.lanes
        for v in range(self.vectors):
            gate = tir.let(self._activation(tile.get(r, v)))
            value = gate if up is None else gate * up.get(r, v)
            tir.store(self.kernel["gates"], row * self.spec.neurons + unit * BLOCK + (v0 + v) * lanes, value)
            fired.set(T.max(fired.get(), self._fires(gate)))

    def _fires(self, gate: Any) -> Any:
        """Return 1 in the lanes that are not below the threshold (NaN is not)."""
        lanes = self.isa.lanes
        below = T.abs(gate) < tir.splat(self.kernel["threshold"], lanes)
        return T.Select(below, tir.i32(0, lanes), tir.i32(1, lanes))

    def _activation(self, x: Any) -> Any:
        lanes = tir.lanes_of(x)
        if self.spec.activation == "silu":
            return silu(x)
        if self.spec.activation == "relu":
            return T.Select(x < tir.f32(0.0, lanes), tir.f32(0.0, lanes), x)
        # gelu_tanh: 1 + tanh(u) = 2 sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        inner = x + tir.f32(0.044715, lanes) * (x * x * x)
        return x * sigmoid(tir.f32(1.5957691216057308, lanes) * inner)

    def _list(self, fused: Any) -> None:
        """Emit: the blocks that fired, in order; all, when they are so many that this is faster.

        Where `fused`, h of the others is no 0, so that only those that fired may be listed.
        """
        k, blocks = self.kernel, self.spec.blocks
        self.active.set(T.int64(0))
        with tir.loop(blocks) as b:
            fired = tir.Register("int32", 1)
            fired.set(tir.load(k["flags"], b * self.per_block))
            for s in range(1, self.per_block):
                fired.set(T.max(fired.get(), tir.load(k["flags"], b * self.per_block + s)))
            tir.store(k["listed"], self.active.get(), tir.cast(b, "int32"))
            self.active.set(self.active.get() + tir.cast(fired.get(), "int64"))
        if self.may_fuse:
            tir.store(k["state"], 0, tir.cast(self.active.get(), "int32"))
        with tir.when(T.And(self.active.get() >= k["dense_from"], fused < 1)):
            with tir.loop(blocks) as b:
                tir.store(k["listed"], b, tir.cast(b, "int32"))
            self.active.set(T.int64(blocks))

    def _hidden(self, thread: Any, count: Any, fused: Any) -> None:
        """Phase 2: a thread's share of the listed blocks: up, the product, and h prepared for down.

        Where `fused`, h is there.
        """
        k = self.kernel
        first, last = shared_range(count, thread, k["threads"])
        with tir.loop(tir.let(last - first)) as i:
            at = tir.let(first + i)
            block = tir.let(tir.cast(tir.load(k["listed"], at), "int64"))
            following = tir.let(tir.cast(tir.load(k["listed"], T.min(at + 1, count - 1)), "int64"))
            with tir.loop(row_tiles(self.pair)) as t:
                row0 = tir.let(t * self.rows)
                seen = tir.local("int32", max(2, self.rows))
                for r in range(self.rows):
                    tir.store(seen, r, T.int32(1))
                    if self.spec.select == "threshold":
                        with tir.when(row0 + r < k["m"]):
                            tir.store(seen, r, self._row_fires(row0 + r, block))
                with tir.loop(self.per_block) as s:
                    unit = tir.let(block * self.per_block + s)
                    inside = s + 1 < self.per_block
                    later = tir.let(T.Select(inside, unit + 1, following * self.per_block))
                    with tir.when(fused < 1):
                        for v0 in self._tiles():
                            self._hidden_tile(unit, later, v0, row0, seen)
                for r in range(self.rows):
                    with tir.when(row0 + r < k["m"]):
                        self._prepare(row0 + r, block)

    def _row_fires(self, row: Any, block: Any) -> Any:
        """Return 1 if row `row` uses the block."""
        lanes = self.isa.lanes
        fired = tir.Register("int32", lanes)
        fired.set(tir.i32(0, lanes))
        start = tir.let(row * self.spec.neurons + block * self.spec.block)
        with tir.loop(self.spec.block // lanes) as i:
            gate = tir.let(tir.load(self.kernel["gates"], start + i * lanes, lanes))
            fired.set(T.max(fired.get(), self._fires(gate)))
        return fold(fired.get(), T.max)

    def _hidden_tile(self, unit: Any, later: Any, v0: int, row0: Any, seen: Any) -> None:
        k, lanes = self.kernel, self.isa.lanes
        gate = None
        if self.spec.select == "indices":
            gate = self._compute(self.pair, self._pair_stream(unit, 0, later), v0, row0)
        up = self._compute(self.pair, self._pair_stream(unit, 1, later), v0, row0)
        for r in range(self.rows):
            with tir.when(row0 + r < k["m"]):
                for v in range(self.vectors):
                    at = tir.let((row0 + r) * self.spec.neurons + unit * BLOCK + (v0 + v) * lanes)
                    if gate is None:
                        active = tir.load(k["gates"], at, lanes)
                        use = tir.splat(tir.load(seen, r), lanes) > tir.i32(0, lanes)
                        value = T.Select(use, active * up.get(r, v), tir.f32(0.0, lanes))
                    else:
                        value = self._activation(gate.get(r, v)) * up.get(r, v)
                    tir.store(k["gates"], at, value)

    def _prepare(self, row: Any, block: Any) -> None:
        """Emit: one block of h to the groups of down's rows."""
        k, c, lanes = self.kernel, self.down, self.isa.lanes
        start = tir.let(row * self.spec.neurons + block * self.spec.block)
        if c.integer:
            size = self.spec.down.group_size
            with tir.loop(self.spec.block // size) as g:
                group = tir.let(block * (self.spec.block // size) + g)
                quantize_group(
                    self.isa, c.spec, k["gates"], tir.let(start + g * size), c.row_outputs(False), row, group
                )
            return
        out = tir.buffer_at(c.kernel["codes"], "float32")
        with tir.loop(self.spec.block // lanes) as i:
            value = tir.load(k["gates"], start + i * lanes, lanes)
            tir.store(out, row * c.k_padded + block * self.spec.block + i * lanes, value)

    def _down(self, thread: Any, count: Any) -> None:
        """Phase 3: a thread's share of the output rows over the listed groups."""
        k, c = self.kernel, self.down
        per_block = self.spec.block // self.spec.down.group_size
        first, last = shared_range(T.int64(-(-self.spec.hidden // BLOCK)), thread, k["threads"])
        with tir.loop(tir.let(last - first)) as i:
            unit = tir.let(first + i)
            with tir.loop(row_tiles(c)) as t:
                row0 = tir.let(t * self.rows)
                for v0 in self._tiles():
                    plain = stream_of(c, unit)
                    stream = _ListedStream(
                        self.isa, plain.spec, plain.views, plain.at, k["listed"], count, per_block
                    )
                    tile = self._compute(c, stream, v0, row0)
                    for r in range(self.rows):
                        with tir.when(row0 + r < k["m"]):
                            for v in range(self.vectors):
                                column = tir.let(unit * BLOCK + (v0 + v) * self.isa.lanes)
                                finish_vector(c, tir.let(row0 + r), column, tile.get(r, v), None)
