"""Rotary positions as ONNX: RotaryEmbedding (com.microsoft) on whole heads, or on their rotated part."""

from __future__ import annotations

from ...compiler.backends.onnx_graph import MICROSOFT, Graph


def rotate(
    graph: Graph, x: str, positions: str, cos: str, sin: str, *, heads: int, head_dim: int, rotary: int,
    interleaved: bool,
) -> str:  # fmt: skip
    """Turn x [1, T, heads * head_dim]; cos and sin are [context, rotary / 2], positions int64 [1, T]."""
    if rotary == head_dim:
        return _rotated(graph, x, positions, cos, sin, interleaved)
    cut = graph.node("Reshape", x, graph.constant([0, 0, heads, head_dim]))
    turned, kept = graph.nodes("Split", cut, graph.constant([rotary, head_dim - rotary]), axis=-1, outputs=2)
    flat = graph.node("Reshape", turned, graph.constant([0, 0, heads * rotary]))
    flat = _rotated(graph, flat, positions, cos, sin, interleaved)
    turned = graph.node("Reshape", flat, graph.constant([0, 0, heads, rotary]))
    joined = graph.node("Concat", turned, kept, axis=-1)
    return graph.node("Reshape", joined, graph.constant([0, 0, heads * head_dim]))


def _rotated(graph: Graph, x: str, positions: str, cos: str, sin: str, interleaved: bool) -> str:
    return graph.node(
        "RotaryEmbedding", x, positions, cos, sin, domain=MICROSOFT, interleaved=int(interleaved)
    )
