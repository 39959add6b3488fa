"""The layers on a CPU for many rows (a chunk of a prompt): one launch, work claimed between barriers.

Rows are normalised and rounded once by the thread that has them, products and attention are claimed block by
block. On a matrix unit the gated product leaves its epilogue as tiles of the next one.
"""

from __future__ import annotations

from typing import Any

from ..attention.tvm_cpu import prefill_emitter
from ..norm.spec import NormSpec
from ..norm.tvm_emit import NormRow
from ..quant_matmul.packing import BLOCK
from ..quant_matmul.sizes import padded_k, uses_matrix
from ..quant_matmul.tvm_cpu import many_share, prepare_many
from ..quant_matmul.tvm_cpu_context import Context, row_tiles, shared_range
from ..quant_matmul.tvm_cpu_matrix import tile_sink
from ..shared import tir
from ..shared.barrier import CLAIMS, barrier_ir
from ..shared.tir import T
from .tvm_cpu import ARGUMENTS, Step
from .workspace import chunk_area


class Chunk(Step):
    """Emitter of a launch for many rows: embedding and layers, without the head."""

    def emit(self) -> Any:
        """Return the PrimFunc."""
        self.kernel = tir.Kernel(self.name, [(n, "int64" if n == "gated" else kind) for n, kind in ARGUMENTS])
        k = self.kernel
        self.m = tir.let(k["batch"] * k["tq"])
        area = chunk_area(self.spec, self.isa.name)
        with tir.import_llvm(barrier_ir(self.arch)), tir.parallel(k["threads"]) as thread:
            self.thread = thread
            padded = tir.let(T.truncdiv(self.m + (self.rows - 1), T.int64(self.rows)) * self.rows)
            self.codes = k["work"]
            self.scales = tir.let(self.codes + padded * area.code_bytes)
            self.sums = tir.let(self.scales + padded * area.group_bytes)
            threads_at = tir.let(self.sums + padded * area.group_bytes)
            self.normed = tir.buffer_at(tir.let(threads_at + thread * area.fixed_bytes), "float32")
            self.panels = tir.let(threads_at + k["threads"] * area.fixed_bytes)
            self.claims = tir.let(k["barrier"] + CLAIMS)
            self._barrier()  # the counter of claimed work is 0 from here on
            with tir.when(k["embed"] != T.int64(0)):
                self._embed()
                self._barrier()
            self._layers()
        return self.kernel.finish()

    def _layer(self, at: dict[str, Any]) -> None:
        k, spec = self.kernel, self.spec
        for kind in self._kinds(at, "qkv", "values"):
            self._qkv_products(at, kind)
        first, last = shared_range(self.m, self.thread, k["threads"])
        with tir.loop(tir.let(last - first)) as i:
            heads = T.int64(spec.num_heads + 2 * spec.num_kv_heads)
            self._rotate_and_append(at, tir.let(first + i), T.int64(0), heads)
        self._barrier()

        sizes = (int(self.configuration["block_q"]), int(self.configuration["block_k"]))
        prefill_emitter(self._attention(at), *sizes, self.claims).phase(self.thread)
        self._barrier()
        self._many_product(at, "o", k["attended"], "attn_post_norm")

        gated = tir.buffer_at(k["gated"], "float32")
        downs = [spec.matmul("down", kind) for kind in range(len(spec.layers))]
        tiled = all(uses_matrix(down) and padded_k(down) == down.k for down in downs)
        for kind in self._kinds(at, "gate_up"):
            gate_up = self._gate_up(at, kind, gated)
            if tiled:
                gate_up.sink = tile_sink(self.isa, k["gated"], spec.intermediate)
            self._normed_rows(tir.buffer_at(at["mlp_norm"], "float32"), gate_up)
            self._claimed(gate_up)
        self._many_product(at, "down", None if tiled else gated, "mlp_post_norm")

    def _qkv_products(self, at: dict[str, Any], kind: int) -> None:
        norm, prepared = tir.buffer_at(at["attn_norm"], "float32"), 0
        for name, _, _ in self._head_parts(kind):
            context = self._qkv(at, name, kind)
            if not context.matrix or context.k_padded != prepared:  # int8 codes depend on the weight's groups
                self._normed_rows(norm, context)
            prepared = context.k_padded
            self._claimed(context)

    def _between_layers(self, layer: Any) -> None:
        """Nothing: a layer's last product ends with a barrier."""

    def _many_product(self, at: dict[str, Any], name: str, source: Any, post_norm: str) -> None:
        """Emit x += source @ W.T (or norm of it); without a source its tiles stand in `gated`."""
        for kind in self._kinds(at, name):
            context = self._added_product(at, name, source, kind)
            if source is None:
                context.kernel["codes"] = self.kernel["gated"]
            else:
                with self._own_rows(context) as row:
                    prepare_many(context, row)
                self._barrier()
            self._claimed(context)
        if self.spec.post_norms:  # each thread's rows are those that it normalises next: no barrier
            weight = tir.buffer_at(at[post_norm], "float32")
            with self._own_rows(self.current) as row, tir.when(row < self.m):
                self._add_normed(row, weight)

    def _claimed(self, context: Context) -> None:
        many_share(context, self.thread)
        self._barrier()

    def _context(self, name: str, buffers: dict[str, Any], kind: int = 0) -> Context:
        more = {"panel": self.panels, "counter": self.claims}
        return super()._context(name, more | buffers, kind)

    def _vectors(self) -> int:
        return min(int(self.configuration["tile_vectors"]), BLOCK // self.isa.lanes)

    def _own_rows(self, context: Context) -> Any:
        """Loop over this thread's share of the rows, padding included."""
        total = tir.let(row_tiles(context) * self.rows)
        first, last = shared_range(total, self.thread, self.kernel["threads"])
        return tir.span(first, last)

    def _normed_rows(self, weight: Any, context: Context) -> None:
        """Emit: this thread's rows of x normalised and prepared, then a barrier."""
        spec, k = self.spec, self.kernel
        norm = NormSpec("rms", spec.hidden, spec.eps)
        with self._own_rows(context) as row:
            with tir.when(row < self.m):
                emitter = NormRow(norm, self.isa.lanes, 2, k["x"], tir.let(row * spec.hidden))
                emitter.store(weight, None, self.normed, T.int64(0))
            prepare_many(context, row, x_at=T.int64(0))
        self._barrier()
