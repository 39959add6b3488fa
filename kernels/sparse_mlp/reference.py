"""The definition of right for the sparse MLP, in plain PyTorch: all of it is computed, then masked."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quant_matmul.reference import quant_matmul
from ..quant_matmul.spec import QuantMatmulSpec
from ..quant_matmul.weight_format import CanonicalWeight
from .spec import SparseMlpSpec

_ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "relu": torch.relu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def sparse_mlp(
    spec: SparseMlpSpec,
    x: Tensor,
    gate_up: CanonicalWeight,
    down: CanonicalWeight,
    *,
    threshold: float = 0.0,
    indices: Tensor | None = None,
) -> Tensor:
    """Return y [M, K] in x's dtype; arguments as in SparseMlpSpec."""
    h = hidden(spec, x, gate_up)
    seen = active(spec, x, gate_up, threshold=threshold, indices=indices)
    h = h.masked_fill(~seen.repeat_interleave(spec.block, 1), 0.0)
    last = QuantMatmulSpec(spec.hidden, spec.neurons, spec.down, spec.arithmetic)
    return quant_matmul(last, h.float(), down).to(x.dtype)


def active(
    spec: SparseMlpSpec, x: Tensor, gate_up: CanonicalWeight, *, threshold: float = 0.0,
    indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return which blocks of neurons each row uses: bool [M, blocks]. A NaN is never below a threshold."""
    if spec.select == "indices":
        assert indices is not None
        seen = torch.zeros(x.shape[0], spec.blocks, dtype=torch.bool)
        seen[:, indices.long()] = True
        return seen
    fired = ~(gates(spec, x, gate_up).abs() < threshold)
    return fired.view(x.shape[0], spec.blocks, spec.block).any(2)


def gates(spec: SparseMlpSpec, x: Tensor, gate_up: CanonicalWeight) -> Tensor:
    """Return act(gate(x)), fp32 [M, F]."""
    return _ACTIVATIONS[spec.activation](_product(spec, x, gate_up.slice_rows(0, spec.neurons)))


def hidden(spec: SparseMlpSpec, x: Tensor, gate_up: CanonicalWeight) -> Tensor:
    """Return act(gate(x)) * up(x) of every neuron, fp32 [M, F]."""
    return gates(spec, x, gate_up) * _product(spec, x, gate_up.slice_rows(spec.neurons, 2 * spec.neurons))


def _product(spec: SparseMlpSpec, x: Tensor, weight: CanonicalWeight) -> Tensor:
    problem = QuantMatmulSpec(spec.neurons, spec.hidden, spec.gate_up, spec.arithmetic)
    return quant_matmul(problem, x.float(), weight)
