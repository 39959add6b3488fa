"""The quantised product as ONNX: MatMulNBits with explicit zero points, and what it leaves of minima.

MatMulNBits (com.microsoft) computes x @ (scale * (code - zero)).T for codes of 4 or 8 bits and integer
zeros. A format with minima, scale * code + minimum, takes the nearest integer zero; the rest, one number a
group and row, is multiplied with the sums of x over groups: exact, for one bit a weight more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ...compiler.backends.onnx_graph import MICROSOFT, Graph
from .weight_format import CanonicalWeight


@dataclass(frozen=True)
class NBits:
    """A weight [N, K] as MatMulNBits takes it: nb groups of `group_size` values, padded past K.

    `codes` uint8 [N, nb, group_size * bits / 8] (two 4-bit codes a byte, the even one low), `scales` fp32
    [N, nb], `zeros` uint8 [N, ceil(nb * bits / 8)] packed alike, `rest` fp32 [N, nb] or None.
    """

    bits: int
    group_size: int
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    rest: np.ndarray | None


def to_nbits(weight: CanonicalWeight) -> NBits:
    """Return an integer weight's tensors for MatMulNBits, without loss but fp32 rounding of `rest`."""
    fmt, n, k = weight.format, weight.n, weight.k
    bits, size, groups = 4 if fmt.bits <= 4 else 8, fmt.group_size, -(-k // fmt.group_size)
    scales = weight.group_scales()[:, :groups]
    offset = 128 if fmt.zero == "none" else 0
    codes = torch.zeros(n, groups * size, dtype=torch.uint8)
    codes[:, :k] = (weight.codes.to(torch.int16) + offset).to(torch.uint8)
    rest = None
    if fmt.zero in ("minimum", "integer"):
        held = weight.group_minima()[:, :groups]
        if fmt.zero == "integer":
            zeros = held
        else:
            ratio = torch.where(scales == 0, torch.zeros_like(scales), -held / scales)
            zeros = ratio.round().clamp(0, (1 << bits) - 1).nan_to_num()
            rest = (held + scales * zeros).numpy()
    else:
        zeros = torch.full_like(scales, offset or fmt.zero_point)
    return NBits(
        bits, size, _packed(codes, bits).view(n, groups, -1).numpy(), scales.numpy(),
        _packed(zeros.to(torch.uint8), bits).numpy(), rest,
    )  # fmt: skip


def _packed(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes [N, columns] as they are, or two a byte [N, ceil(columns / 2)]."""
    if bits == 8:
        return values
    if values.shape[1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    return values[:, 0::2] | values[:, 1::2] << 4


@dataclass(frozen=True)
class Product:
    """A weight in a graph: the names of its tensors, once, for every node that reads it."""

    name: str
    n: int
    k: int
    bits: int
    group_size: int
    codes: str
    scales: str
    zeros: str
    rest: str
    middle: bool = False  # every zero point is the middle code, which MatMulNBits takes without zeros


def add_weight(graph: Graph, name: str, weight: CanonicalWeight) -> Product:
    """Put a weight into a graph; a float one lies there transposed, [K, N]."""
    n, k = weight.n, weight.k
    if weight.format.is_float:
        return Product(name, n, k, 0, 0, graph.floats(name, weight.codes.float().numpy().T), "", "", "")
    held = to_nbits(weight)
    rest = "" if held.rest is None else graph.floats(f"{name}.rest", held.rest.T)
    return Product(
        name, n, k, held.bits, held.group_size, graph.tensor(f"{name}.codes", held.codes),
        graph.floats(f"{name}.scales", held.scales), graph.tensor(f"{name}.zeros", held.zeros), rest,
        _middle(weight),
    )  # fmt: skip


def _middle(weight: CanonicalWeight) -> bool:
    fmt = weight.format
    return fmt.zero == "none" or (fmt.zero == "constant" and fmt.zero_point == (8 if fmt.bits <= 4 else 128))


def group_sums(graph: Graph, x: str, k: int, group_size: int) -> str:
    """Sums of x [1, T, K] over groups: [1, T, groups]."""
    if k % group_size:
        x = graph.node("Pad", x, graph.constant([0, 0, 0, 0, 0, -k % group_size]))
    parts = graph.node("Reshape", x, graph.constant([0, 0, -1, group_size]))
    return graph.node("ReduceSum", parts, graph.constant([-1]), keepdims=0)


def product(
    graph: Graph, x: str, weight: Product, accuracy_level: int, bias: str = "", sums: str = "",
    cpu: bool = False,
) -> str:  # fmt: skip
    """x [1, T, K] @ weight.T (+ bias [N]): [1, T, N].

    ``accuracy_level`` is MatMulNBits': 1 keeps fp32 activations, 4 rounds them to int8 in groups (read by
    ONNX Runtime's CPU provider alone). The bias is a node of its own: DirectML's kernel takes four inputs,
    all of them. For ``cpu`` zero points that are the middle are left out, which saves their correction.
    """
    if not weight.bits:
        y = graph.node("MatMul", x, weight.codes, name=f"{weight.name}/matmul")
    else:
        zeros = [] if cpu and weight.middle else [weight.zeros]
        y = graph.node(
            "MatMulNBits", x, weight.codes, weight.scales, *zeros, name=f"{weight.name}/matmul",
            domain=MICROSOFT, N=weight.n, K=weight.k, bits=weight.bits, block_size=weight.group_size,
            accuracy_level=accuracy_level,
        )  # fmt: skip
    if weight.rest:
        sums = sums or group_sums(graph, x, weight.k, weight.group_size)
        y = graph.node("Add", y, graph.node("MatMul", sums, weight.rest))
    return graph.node("Add", y, bias) if bias else y
