"""A decoder with its KV cache as one ONNX graph, from a checkpoint, in operators that DirectML has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..compiler.backends.onnx_graph import MICROSOFT, Graph
from ..kernels.attention.onnx_form import CacheNames, Heads, attention, cpu_attention
from ..kernels.embedding.onnx_form import rows
from ..kernels.norm.onnx_form import add_and_norm, rms_norm
from ..kernels.quant_matmul import CanonicalWeight
from ..kernels.quant_matmul.onnx_form import Product, add_weight, group_sums, product
from ..kernels.rope.onnx_form import rotate
from .config import ModelConfig
from .decoder import Checkpoint
from .requantise import common_format, values_apart

IDS, POSITIONS, SEQLENS, TOTAL, ROWS, LOGITS = (
    "input_ids", "position_ids", "seqlens_k", "total_sequence_length", "logit_rows", "logits",
)  # fmt: skip


@dataclass(frozen=True)
class GraphOptions:
    """``context`` tokens fit the cache. ``accuracy_level`` is MatMulNBits' (4: int8 activations; 1: fp32).

    ``cpu``: nodes that ONNX Runtime's CPU provider is fastest with, which DirectML has no kernels for.
    """

    context: int
    accuracy_level: int = 4
    cpu: bool = False


def cache_names(layer: int) -> tuple[tuple[str, str], tuple[str, str]]:
    """(inputs, outputs) of a layer's keys and values; the names of Hugging Face's exports."""
    past = (f"past_key_values.{layer}.key", f"past_key_values.{layer}.value")
    return past, (f"present.{layer}.key", f"present.{layer}.value")


def build_graph(
    graph: Graph, checkpoint: Checkpoint, options: GraphOptions,
    progress: Callable[[int, int], None] | None = None, held: dict[str, Product] | None = None,
) -> dict[str, Product]:  # fmt: skip
    """Write a decoder into ``graph``, one weight in memory at a time; return its weights' places.

    ``held``, what this returned for a sibling of ``graph``, saves reading the weights again.

    Inputs: input_ids and position_ids int64 [1, T]; seqlens_k int32 [1], the row's tokens less one, and
    total_sequence_length int32 [1], both with this chunk; logit_rows int64 [R], the rows of the chunk that
    are asked for; past_key_values.N.key and .value [1, Hkv, context, D]. Outputs: logits fp32 [1, R, V],
    present.N.key and .value, which share the memory of the past ones.
    """
    c = checkpoint.config
    ids = graph.input(IDS, "int64", [1, "tokens"])
    graph.input(POSITIONS, "int64", [1, "tokens"])
    graph.input(SEQLENS, "int32", [1])
    graph.input(TOTAL, "int32", [1])
    wanted = graph.input(ROWS, "int64", ["rows"])
    shape = [1, c.num_kv_heads, options.context, c.head_dim]
    for layer in range(c.num_layers):
        past, present = cache_names(layer)
        for before, after in zip(past, present):
            graph.input(before, graph.float_type, shape)
            graph.output(after, graph.float_type, shape)
    tables = [rope.tables(c.rotary, options.context) for rope in c.ropes]
    turns = [
        tuple(graph.floats(f"{part}.{i}", table.numpy()) for part, table in zip(("cos", "sin"), pair))
        for i, pair in enumerate(tables)
    ]
    held = {} if held is None else held
    weight = checkpoint.weight("embed")
    table = held["embed"] = held.get("embed") or add_weight(graph, "embed", weight)
    x = rows(graph, ids, table, weight, c.embedding_scale)
    del weight
    delta = ""
    for i in range(c.num_layers):
        x, delta = _Layer(graph, checkpoint, options, i, held).emit(x, delta, turns[c.rope_kind(i)])
        if progress is not None:
            progress(i + 1, c.num_layers)
    _, normed = add_and_norm(
        graph, x, delta, graph.floats("norm", checkpoint.vector("norm").numpy()), c.norm_eps
    )
    if not c.tie_embeddings and "head" not in held:
        held["head"] = add_weight(graph, "head", checkpoint.weight("head"))
    last = graph.node("Gather", normed, wanted, axis=1)
    head = held["embed" if c.tie_embeddings else "head"]
    logits = product(graph, last, head, options.accuracy_level, cpu=options.cpu)
    if c.logit_softcap:
        cap = graph.constant(c.logit_softcap, "float")
        logits = graph.node("Mul", graph.node("Tanh", graph.node("Div", logits, cap)), cap)
    graph.nodes("Cast", logits, outputs=[LOGITS], to=graph.onnx_type("float32"))
    graph.output(LOGITS, "float32", [1, "rows", c.vocab_size])
    return held


class _Layer:
    """One block: attention and gated MLP behind their norms."""

    def __init__(
        self, graph: Graph, checkpoint: Checkpoint, options: GraphOptions, layer: int,
        held: dict[str, Product],
    ) -> None:  # fmt: skip
        self.graph, self.checkpoint, self.options, self.layer = graph, checkpoint, options, layer
        self.held = held
        self.config: ModelConfig = checkpoint.config
        self.at = f"layers.{layer}."

    def emit(self, x: str, delta: str, turns: tuple[str, ...]) -> tuple[str, str]:
        """Take a residual and what is still to be added to it; return the same of this block's end."""
        c = self.config
        if delta:
            x, normed = add_and_norm(self.graph, x, delta, self._vector("attn_norm"), c.norm_eps)
        else:
            normed = rms_norm(self.graph, x, self._vector("attn_norm"), c.norm_eps)
        out = self._attention(normed, turns)
        if c.post_norms:
            out = rms_norm(self.graph, out, self._vector("attn_post_norm"), c.norm_eps)
        x, normed = add_and_norm(self.graph, x, out, self._vector("mlp_norm"), c.norm_eps)
        out = self._mlp(normed)
        if c.post_norms:
            out = rms_norm(self.graph, out, self._vector("mlp_post_norm"), c.norm_eps)
        return x, out

    def _attention(self, x: str, turns: tuple[str, ...]) -> str:
        c, graph = self.config, self.graph
        q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        past, present = cache_names(self.layer)
        names = CacheNames(*past, *present, SEQLENS, TOTAL, POSITIONS, self.options.context)
        heads = Heads(
            c.num_heads, c.num_kv_heads, c.head_dim, c.scale, self._window(), c.attention_softcap
        )  # fmt: skip
        weights = [self.checkpoint.weight(self.at + part) for part in "qkv"]
        if values_apart([weight.format for weight in weights]):
            qk = self._linear(x, ("q", "k"), c.attention_bias, weights[:2])
            v = self._linear(x, ("v",), c.attention_bias, weights[2:])
        else:
            qkv = self._linear(x, ("q", "k", "v"), c.attention_bias, weights)
            if self._cpu_attention and c.rotary == c.head_dim and c.head_dim % 16 == 0 and not c.qk_norm:
                out = cpu_attention(graph, [qkv], names, heads, turns, c.rope_interleaved)
                return self._linear(out, ("o",), c.o_bias)
            sizes = graph.constant([q_size + kv_size, kv_size])
            qk, v = graph.nodes("Split", qkv, sizes, axis=-1, outputs=2)
        if c.qk_norm:
            qk = self._head_norms(qk)
        qk = rotate(
            graph, qk, POSITIONS, *turns, heads=c.num_heads + c.num_kv_heads, head_dim=c.head_dim,
            rotary=c.rotary, interleaved=c.rope_interleaved,
        )  # fmt: skip
        q, k = graph.nodes("Split", qk, graph.constant([q_size, kv_size]), axis=-1, outputs=2)
        if self._cpu_attention:
            out = cpu_attention(graph, (q, k, v), names, heads)
        else:
            out = attention(graph, q, k, v, names, heads)
        return self._linear(out, ("o",), c.o_bias)

    @property
    def _cpu_attention(self) -> bool:
        """Whether GroupQueryAttention of the CPU provider is taken: heads of whole vectors, no window."""
        return self.options.cpu and self.config.head_dim % 8 == 0 and not self._window()

    def _window(self) -> int:
        """The layer's window, 0 where it holds the whole cache."""
        window = self.config.window(self.layer)
        return window if window < self.options.context else 0

    def _head_norms(self, qk: str) -> str:
        c, graph = self.config, self.graph
        cut = graph.node("Reshape", qk, graph.constant([0, 0, c.num_heads + c.num_kv_heads, c.head_dim]))
        sizes = graph.constant([c.num_heads, c.num_kv_heads])
        parts = graph.nodes("Split", cut, sizes, axis=2, outputs=2)
        normed = [
            rms_norm(graph, part, self._vector(name), c.norm_eps)
            for part, name in zip(parts, ("q_norm", "k_norm"))
        ]
        joined = graph.node("Concat", *normed, axis=2)
        return graph.node("Reshape", joined, graph.constant([0, 0, -1]))

    def _mlp(self, x: str) -> str:
        c, graph = self.config, self.graph
        both = self._linear(x, ("gate", "up"), c.mlp_bias)
        gate, up = graph.nodes("Split", both, graph.constant([c.intermediate_size] * 2), axis=-1, outputs=2)
        if c.activation == "silu":
            gate = graph.node("QuickGelu", gate, domain=MICROSOFT, alpha=1.0)  # x * sigmoid(alpha * x)
        else:
            gate = graph.node("FastGelu", gate, domain=MICROSOFT)
        return self._linear(graph.node("Mul", gate, up), ("down",), c.mlp_bias)

    def _linear(
        self, x: str, parts: tuple[str, ...], biased: bool, weights: list[CanonicalWeight] | None = None
    ) -> str:
        """The product with the rows of several matrices, one below the other."""
        graph, name = self.graph, self.at + "_".join(parts)
        if name not in self.held:
            weights = weights or [self.checkpoint.weight(self.at + part) for part in parts]
            self.held[name] = add_weight(graph, name, CanonicalWeight.cat(common_format(weights)))
        held = self.held[name]
        bias = ""
        if biased:
            vectors = [self.checkpoint.vector(f"{self.at}{part}_bias").numpy() for part in parts]
            bias = graph.floats(f"{name}.bias", np.concatenate(vectors))
        sums = group_sums(graph, x, held.k, held.group_size) if held.rest else ""
        return product(graph, x, held, self.options.accuracy_level, bias, sums, self.options.cpu)

    def _vector(self, name: str) -> str:
        return self.graph.floats(self.at + name, self.checkpoint.vector(self.at + name).numpy())
