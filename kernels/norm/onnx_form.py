"""RMSNorm as ONNX: SimplifiedLayerNormalization, or with the residual sum before it the Skip form."""

from __future__ import annotations

from ...compiler.backends.onnx_graph import MICROSOFT, Graph


def rms_norm(graph: Graph, x: str, weight: str, eps: float) -> str:
    """x / rms(x) * weight over the last dimension."""
    return graph.node("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=eps, stash_type=1)


def add_and_norm(graph: Graph, x: str, delta: str, weight: str, eps: float) -> tuple[str, str]:
    """(x + delta, its norm) of x and delta [1, T, D]."""
    graph_name = f"{delta}/norm"
    normed, _, _, total = graph.nodes(
        "SkipSimplifiedLayerNormalization", x, delta, weight, domain=MICROSOFT, epsilon=eps,
        outputs=[graph_name, "", "", f"{delta}/sum"],
    )  # fmt: skip
    return total, normed
