"""The whole step on a CPU: one parallel launch, the phases of the operators between barriers.

Each thread reads one contiguous share of every weight. Norms and activation quantising are repeated by
every thread for itself: that costs less than a barrier.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...compiler.target import Target
from ..attention.tvm_cpu_decode import Decode
from ..attention.tvm_math import LOG2_E
from ..attention.tvm_problem import Arguments, Problem
from ..embedding.spec import EmbeddingSpec
from ..embedding.tvm_emit import PackedRow
from ..norm.spec import NormSpec
from ..norm.tvm_emit import NormRow
from ..quant_matmul.packing import BLOCK, Geometry
from ..quant_matmul.tvm_cpu import direct_share, many_rows, prepare_row
from ..quant_matmul.tvm_cpu_context import Context, row_tiles, shared_range
from ..quant_matmul.tvm_cpu_stream import Prefetch
from ..rope.spec import RopeSpec
from ..rope.tvm_emit import emit_rope_row
from ..shared import tir
from ..shared.barrier import barrier_ir, wait
from ..shared.claim import offer, taken
from ..shared.isa.table import Isa, by_name
from ..shared.tir import T
from .append import append_row
from .spec import LAYER_SLOTS, DecoderStepSpec
from .workspace import OFFER_BYTES, OFFERS, thread_area

ARGUMENTS = [
    ("threads", "int64"), ("one", "int64"), ("batch", "int64"), ("tq", "int64"), ("position", "int64"),
    ("layers", "int64"), ("table", "*int64"),
    ("ids", "*int64"), ("embed", "int64"), ("head", "int64"), ("head_norm", "*float32"),
    ("x", "*float32"), ("qkv", "*float32"), ("attended", "*float32"), ("gated", "*float32"),
    ("projected", "*float32"), ("logits", "*float32"),
    ("work", "int64"), ("attention_scratch", "int64"), ("barrier", "int64"),
    ("cos", "*float32"), ("sin", "*float32"), ("rope_sk", "int64"), ("rope_sb", "int64"),
    ("limits", "*int32"),
    ("k_sb", "int64"), ("k_sh", "int64"), ("v_sb", "int64"), ("v_sh", "int64"),
    ("ks_sb", "int64"), ("ks_sh", "int64"), ("chunk", "int64"),
]  # fmt: skip


def lower(spec: DecoderStepSpec, configuration: Mapping[str, Any], target: Target) -> list[Any]:
    """Return `step_1` (one row), `step_n` (a few rows: a batch, or tokens of one sequence), `chunk` (many).

    On a matrix unit (activation "bfloat16") `chunk` alone.
    """
    from .tvm_chunk import Chunk

    isa = by_name(str(configuration.get("isa") or target.isa))
    chunk = Chunk(
        "chunk", spec, isa, many_rows(spec.matmul("qkv"), configuration), configuration, target.arch
    )
    if spec.activation == "bfloat16":
        return [chunk.emit()]
    steps = [("step_1", 1), ("step_n", int(configuration["small_rows"]))]
    few = [Step(name, spec, isa, count, configuration, target.arch).emit() for name, count in steps]
    return [*few, chunk.emit()]


class Step:
    """Emitter of a launch for a few rows."""

    def __init__(
        self,
        name: str,
        spec: DecoderStepSpec,
        isa: Isa,
        rows: int,
        configuration: Mapping[str, Any],
        arch: str,
    ) -> None:
        self.spec, self.isa, self.rows, self.configuration, self.arch = spec, isa, rows, configuration, arch
        self.name = name
        self.kernel: Any = None
        self.m: Any = None

    def emit(self) -> Any:
        """Return the PrimFunc."""
        self.kernel = tir.Kernel(self.name, ARGUMENTS)
        k, spec = self.kernel, self.spec
        self.m = tir.let(k["batch"] * k["tq"])
        area = thread_area(spec, self.rows)
        with tir.import_llvm(barrier_ir(self.arch)), tir.parallel(k["threads"]) as thread:
            self.thread = thread
            padded = T.truncdiv(self.m + (self.rows - 1), T.int64(self.rows)) * self.rows
            stride = tir.let(padded * area.row_bytes + area.fixed_bytes)
            base = tir.let(k["work"] + thread * stride)
            self.offers = (tir.let(k["work"] + (area.fixed_bytes - OFFER_BYTES)), stride)
            self.normed = tir.buffer_at(base, "float32")
            self.codes = tir.let(base + area.fixed_bytes)
            self.scales = tir.let(self.codes + padded * area.code_bytes)
            self.sums = tir.let(self.scales + padded * area.group_bytes)
            with tir.when(k["embed"] != T.int64(0)):
                self._embed()
                self._barrier()
            self._layers()
            with tir.when(k["head"] != T.int64(0)):
                with tir.when(k["layers"] == T.int64(0)):
                    self._offer("head")
                    self._barrier()
                self._normed_rows(k["head_norm"], self._context("head", {"w": k["head"], "y": k["logits"]}))
                direct_share(self.current, thread, self._prefetch("head"), share=self._taken("head"))
        return self.kernel.finish()

    def _layers(self) -> None:
        k = self.kernel
        with tir.loop(k["layers"]) as layer:
            table = enumerate(LAYER_SLOTS)
            self._layer({s: tir.let(tir.load(k["table"], layer * len(LAYER_SLOTS) + i)) for i, s in table})
            self._between_layers(layer)

    def _between_layers(self, layer: Any) -> None:
        """Emit the barrier behind a layer, the next one's first weight on its way."""
        k, slots = self.kernel, len(LAYER_SLOTS)
        with tir.when(layer + 1 < k["layers"]):
            entry = lambda name: tir.let(  # noqa: E731
                tir.load(k["table"], (layer + 1) * slots + LAYER_SLOTS.index(name))
            )
            self._ahead({name: entry(name) for name in ("qkv", "kind")}, "qkv", self.spec.head_dim // BLOCK)
        with tir.when(layer + 1 == k["layers"]):
            self._offer("head")
        self._barrier()

    def _layer(self, at: dict[str, Any]) -> None:
        k, thread = self.kernel, self.thread
        for kind in self._kinds(at, "qkv", "values"):
            self._heads(at, kind)
        self._ahead(at, "o")
        self._offer("o")
        self._barrier()

        decode = Decode(
            self._attention(at), int(self.configuration["chunk"]), bool(self.configuration["kv_prefetch"])
        )
        decode.phase_partials(thread)
        self._barrier()
        rows = tir.let(decode.rows())
        first, last = shared_range(rows, thread, k["threads"])
        with tir.loop(tir.let(last - first)) as row:
            decode.phase_merge(tir.let(first + row))
        self._barrier()

        self._product(at, "o", k["attended"], "attn_post_norm")
        self._ahead(at, "gate_up")
        self._offer("gate_up")
        self._barrier()
        for kind in self._kinds(at, "gate_up"):
            gate_up = self._gate_up(at, kind, k["gated"])
            self._normed_rows(tir.buffer_at(at["mlp_norm"], "float32"), gate_up)
            direct_share(gate_up, thread, self._prefetch("gate_up", kind), share=self._taken("gate_up"))
        self._ahead(at, "down")
        self._offer("down")
        self._barrier()
        self._product(at, "down", k["gated"], "mlp_post_norm")

    def _kinds(self, at: dict[str, Any], *names: str) -> Iterator[int]:
        """Yield a kind of layer for each combination of formats that these weights have.

        What is emitted meanwhile stands under the condition that the layer at hand has that combination.
        """
        found: dict[tuple[Any, ...], list[int]] = {}
        for kind, formats in enumerate(self.spec.layers):
            found.setdefault(tuple(getattr(formats, name) for name in names), []).append(kind)
        for kinds in found.values():
            if len(found) == 1:
                yield 0
                return
            mask = T.int64(sum(1 << kind for kind in kinds))
            with tir.when(T.bitwise_and(T.shift_right(mask, at["kind"]), T.int64(1)) == T.int64(1)):
                yield kinds[0]

    def _heads(self, at: dict[str, Any], kind: int) -> None:
        """Emit: this thread's share of the heads of queries, keys and values; rotated, or in the cache."""
        k, spec, norm = self.kernel, self.spec, tir.buffer_at(at["attn_norm"], "float32")
        for name, first_head, heads in self._head_parts(kind):
            context = self._qkv(at, name, kind)
            self._normed_rows(norm, context)
            ahead = self._prefetch(name, kind)
            direct_share(context, self.thread, ahead, together=spec.head_dim // BLOCK)
            first, last = shared_range(heads, self.thread, k["threads"])
            with tir.loop(self.m) as row:
                self._rotate_and_append(at, row, tir.let(first + first_head), tir.let(last + first_head))

    def _head_parts(self, kind: int) -> list[tuple[str, int, int]]:
        """Return the weights of queries, keys and values: (name, first head, heads)."""
        spec = self.spec
        rotated = spec.num_heads + spec.num_kv_heads
        if spec.layers[kind].values is None:
            return [("qkv", 0, rotated + spec.num_kv_heads)]
        return [("qkv", 0, rotated), ("values", rotated, spec.num_kv_heads)]

    def _qkv(self, at: dict[str, Any], name: str, kind: int) -> Context:
        """Return the context of one of the weights of queries, keys and values."""
        bias = tir.buffer_at(at[f"{name}_bias"], "float32")
        context = self._context(name, {"w": at[name], "y": self.kernel["qkv"], "bias": bias}, kind)
        context.y_columns = self.spec.qkv_columns
        context.y_before = self.spec.qkv_columns - context.spec.n if name == "values" else 0
        return context

    def _gate_up(self, at: dict[str, Any], kind: int, gated: Any) -> Context:
        bias = tir.buffer_at(at["gate_up_bias"], "float32")
        return self._context("gate_up", {"w": at["gate_up"], "y": gated, "bias": bias}, kind)

    def _product(self, at: dict[str, Any], name: str, source: Any, post_norm: str) -> None:
        """Emit x += source @ W.T, or x += norm(source @ W.T)."""
        for kind in self._kinds(at, name):
            context = self._added_product(at, name, source, kind)
            with tir.loop(tir.let(row_tiles(context) * self.rows)) as row:
                prepare_row(context, row)
            direct_share(context, self.thread, self._prefetch(name, kind), share=self._taken(name))
        if self.spec.post_norms:
            self._barrier()
            first, last = shared_range(self.m, self.thread, self.kernel["threads"])
            with tir.span(first, last) as row:
                self._add_normed(row, tir.buffer_at(at[post_norm], "float32"))

    def _added_product(self, at: dict[str, Any], name: str, source: Any, kind: int) -> Context:
        """Return the context of a product that adds to x itself; a norm's input goes to `projected`."""
        y = self.kernel["projected" if self.spec.post_norms else "x"]
        bias = tir.buffer_at(at[f"{name}_bias"], "float32")
        return self._context(name, {"w": at[name], "x": source, "y": y, "residual": y, "bias": bias}, kind)

    def _add_normed(self, row: Any, weight: Any) -> None:
        """Emit: a row of x += norm(the same row of `projected`)."""
        spec, k = self.spec, self.kernel
        norm = NormSpec("rms", spec.hidden, spec.eps, residual=True)
        start = tir.let(row * spec.hidden)
        emitter = NormRow(norm, self.isa.lanes, 2, k["projected"], start)
        emitter.store(weight, None, k["x"], start, k["x"], start)

    def _ahead(self, at: dict[str, Any], name: str, together: int = 1) -> None:
        """Emit prefetches of where this thread's share of a weight begins: it comes while threads wait."""
        for kind in self._kinds(at, name):
            ahead = self._prefetch(name, kind)
            problem = self.spec.matmul(name, kind)
            parts = 2 if problem.pair else 1
            pieces = -(-problem.n // (parts * BLOCK * together))
            first, _ = shared_range(pieces, self.thread, self.kernel["threads"])
            block_bytes = Geometry(problem.weight, problem.k).block_bytes
            view = tir.buffer_at(tir.let(at[name] + first * (together * parts * block_bytes)), "uint8")
            with tir.loop(ahead.distance // 64) as line:
                tir.prefetch(view, line * 64, ahead.locality)

    def _offer(self, name: str) -> None:
        """Emit: this thread's share of a weight's blocks is its own, until others have done theirs.

        Then they take what is left: cores differ, and those of a virtual machine change by the moment.
        """
        problem, (first_offer, stride) = self.spec.matmul(name), self.offers
        pieces = -(-problem.n // ((2 if problem.pair else 1) * BLOCK))
        first, last = shared_range(pieces, self.thread, self.kernel["threads"])
        offer(tir.let(first_offer + self.thread * stride + 64 * OFFERS.index(name)), first, last)

    def _taken(self, name: str) -> Any:
        first_offer, stride = self.offers
        ranges = tir.let(first_offer + 64 * OFFERS.index(name))
        return taken(ranges, stride, self.thread, self.kernel["threads"])

    def _context(self, name: str, buffers: dict[str, Any], kind: int = 0) -> Context:
        """Return a product's emission context over this thread's scratch."""
        k = {
            "m": self.m,
            "threads": self.kernel["threads"],
            "one": self.kernel["one"],
            "codes": self.codes,
            "sums": self.sums,
        }
        k |= {"scales": tir.buffer_at(self.scales, "float32"), "x": self.normed} | buffers
        problem = self.spec.matmul(name, kind)
        self.current = Context(self.isa, problem, k, self.rows, self._vectors())
        return self.current

    def _vectors(self) -> int:
        """Return the vectors of a product's tile."""
        whole = BLOCK // self.isa.lanes
        return whole if self.rows == 1 else min(self.isa.small_vectors, whole)

    def _normed_rows(self, weight: Any, context: Context) -> None:
        """Emit: every row of x normalised and prepared in this thread's scratch."""
        spec, k = self.spec, self.kernel
        norm = NormSpec("rms", spec.hidden, spec.eps)
        with tir.loop(tir.let(row_tiles(context) * self.rows)) as row:
            with tir.when(row < self.m):
                emitter = NormRow(norm, self.isa.lanes, 2, k["x"], tir.let(row * spec.hidden))
                emitter.store(weight, None, self.normed, T.int64(0))
            prepare_row(context, row, x_at=T.int64(0))

    def _rotate_and_append(self, at: dict[str, Any], row: Any, first: Any, last: Any) -> None:
        """Emit: rotate heads [first, last) of a row; keys and values go into the cache."""
        spec, k, lanes = self.spec, self.kernel, self.isa.lanes
        rope = RopeSpec(spec.head_dim, spec.rotary_dim, spec.rope_interleaved)
        with tir.loop(tir.let(last - first)) as i:
            head = tir.let(first + i)
            b, t = tir.let(T.truncdiv(row, k["tq"])), tir.let(T.truncmod(row, k["tq"]))
            source = tir.let(row * spec.qkv_columns + head * spec.head_dim)
            with tir.when(head < spec.num_heads + spec.num_kv_heads):
                if spec.qk_norm:
                    self._norm_head(
                        tir.let(T.Select(head < spec.num_heads, at["q_norm"], at["k_norm"])), source
                    )
                kind = at["rope"] * k["rope_sk"]
                table = tir.let(kind + b * k["rope_sb"] + t * (spec.rotary_dim // 2))
                emit_rope_row(rope, lanes, k["qkv"], source, k["cos"], k["sin"], table, k["qkv"], source)
            with tir.when(head >= spec.num_heads):
                kv_head = tir.let(T.truncmod(head - spec.num_heads, T.int64(spec.num_kv_heads)))
                is_key = head < spec.num_heads + spec.num_kv_heads
                append_row(self, at, b, kv_head, tir.let(k["position"] + t), is_key, source)

    def _norm_head(self, weight: Any, start: Any) -> None:
        """Emit: one head at qkv[start:] normalised in place by the weight at an address."""
        norm, qkv = NormSpec("rms", self.spec.head_dim, self.spec.eps), self.kernel["qkv"]
        NormRow(norm, self.isa.lanes, 2, qkv, start).store(tir.buffer_at(weight, "float32"), None, qkv, start)

    def _attention(self, at: dict[str, Any]) -> Problem:
        spec, k = self.spec, self.kernel
        one = lambda v: T.int64(v)  # noqa: E731
        columns, d, cap = spec.qkv_columns, spec.head_dim, spec.attention_softcap
        scale = spec.attention_scale or d**-0.5
        arguments = Arguments(
            threads=k["threads"], batch=k["batch"], tq=k["tq"], tk=k["position"] + k["tq"],
            q_offset=k["position"],
            window=at["window"], chunk=k["chunk"],
            factor=T.float32(scale / cap if cap else scale * LOG2_E), cap=T.float32(cap * LOG2_E),
            q=k["qkv"], q_sb=k["tq"] * columns, q_sh=one(d), q_st=one(columns),
            k=tir.buffer_at(at["k"], spec.kv_dtype), k_sb=k["k_sb"], k_sh=k["k_sh"], k_st=one(16),
            v=tir.buffer_at(at["v"], spec.kv_dtype), v_sb=k["v_sb"], v_sh=k["v_sh"], v_st=one(d),
            k_scale=tir.buffer_at(at["k_scale"], "float32"), ks_sb=k["ks_sb"], ks_sh=k["ks_sh"],
            v_scale=tir.buffer_at(at["v_scale"], "float32"), vs_sb=k["ks_sb"], vs_sh=k["ks_sh"],
            limits=k["limits"], bias=None, bias_sb=one(0), bias_sh=one(0), bias_st=one(0), sinks=None,
            out=k["attended"], out_sb=k["tq"] * spec.attention_columns, out_sh=one(d),
            out_st=one(spec.attention_columns),
            lse=one(0), scratch=k["attention_scratch"],
        )  # fmt: skip
        return Problem(spec.attention(), self.isa, arguments)

    def _embed(self) -> None:
        """Emit: rows of the table to x, each by one thread."""
        spec, k = self.spec, self.kernel
        table = EmbeddingSpec(
            spec.vocab, spec.hidden, spec.embed, spec.embed_layout, factor=spec.embedding_factor
        )
        first, last = shared_range(self.m, self.thread, k["threads"])
        with tir.loop(tir.let(last - first)) as i:
            row = tir.let(first + i)
            PackedRow(table, k["embed"], tir.let(tir.load(k["ids"], row)), k["x"], tir.let(row * spec.hidden))

    def _barrier(self) -> None:
        wait(self.kernel["barrier"], self.kernel["threads"])

    def _prefetch(self, name: str, kind: int = 0) -> Prefetch:
        return Prefetch.of(self.configuration, self.rows, self.spec.matmul(name, kind).weight.bits)
