"""Rows of a table as ONNX: gathered as they are stored, then unpacked, so that head and table share bytes."""

from __future__ import annotations

from ...compiler.backends.onnx_graph import Graph
from ..quant_matmul import CanonicalWeight
from ..quant_matmul.onnx_form import Product


def rows(graph: Graph, ids: str, table: Product, weight: CanonicalWeight, factor: float) -> str:
    """Rows ids [1, T] of the table [N, K] times factor: [1, T, K].

    A table of floats is stored [K, N] (as a product reads it), so its columns are gathered.
    """
    if not table.bits:
        x = graph.node("Transpose", graph.node("Gather", table.codes, ids, axis=1), perm=[1, 2, 0])
    else:
        x = _unpacked(graph, ids, table, weight)
    return graph.node("Mul", x, graph.constant(factor, "float")) if factor != 1.0 else x


def _unpacked(graph: Graph, ids: str, table: Product, weight: CanonicalWeight) -> str:
    codes = graph.node("Gather", table.codes, ids, axis=0)  # [1, T, groups, bytes]
    groups = -(-table.k // table.group_size)
    if table.bits == 4:
        low = graph.node("BitwiseAnd", codes, graph.constant(15, "uint8"))
        high = graph.node("BitShift", codes, graph.constant(4, "uint8"), direction="RIGHT")
        pair = [graph.node("Unsqueeze", part, graph.constant([-1])) for part in (low, high)]
        both = graph.node("Concat", *pair, axis=-1)
        codes = graph.node("Reshape", both, graph.constant([0, 0, groups, table.group_size]))
    x = graph.node("Cast", codes, to=graph.onnx_type(graph.float_type))
    fmt = weight.format
    scale = graph.node("Unsqueeze", graph.node("Gather", table.scales, ids, axis=0), graph.constant([-1]))
    if fmt.zero == "minimum":
        minima = graph.floats(f"{table.name}.minima", weight.group_minima()[:, :groups].numpy())
        shift = graph.node("Unsqueeze", graph.node("Gather", minima, ids, axis=0), graph.constant([-1]))
        x = graph.node("Add", graph.node("Mul", x, scale), shift)
    else:
        if fmt.zero == "integer":
            zeros = graph.floats(f"{table.name}.points", weight.group_minima()[:, :groups].numpy())
            zero = graph.node("Unsqueeze", graph.node("Gather", zeros, ids, axis=0), graph.constant([-1]))
        else:
            zero = graph.constant(128 if fmt.zero == "none" else fmt.zero_point, "float")
        x = graph.node("Mul", graph.node("Sub", x, zero), scale)
    x = graph.node("Reshape", x, graph.constant([0, 0, groups * table.group_size]))
    if table.k % table.group_size:
        bounds = [graph.constant(v) for v in ([0], [table.k], [-1])]
        x = graph.node("Slice", x, *bounds)
    return x
