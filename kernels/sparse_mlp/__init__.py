"""Sparse gated MLP: only the blocks of neurons that fire are read and computed."""

from __future__ import annotations

from typing import Any

import torch

from ...compiler.operator import Declined, Form, Operator, reference_form
from ...compiler.target import Target
from ..quant_matmul.packing import PackedWeight
from .reference import sparse_mlp
from .space import space
from .spec import SparseMlpSpec

__all__ = ["OPERATOR", "TVM_CPU", "SparseMlpSpec"]


def _decide(spec: SparseMlpSpec, target: Target) -> Declined | None:
    if "tvm_llvm" not in target.backends:
        return Declined(f"{target.name} lists no tvm_llvm back end")
    for fmt in (spec.gate_up, spec.down):
        if fmt.is_float:
            return Declined(f"{fmt.dtype} weights have no sparse kernel")
        if fmt.bits == 8 and fmt.zero in ("integer", "minimum"):
            return Declined("8-bit weights with a stored zero have no kernel")
    return None


def _lower(spec: SparseMlpSpec, configuration: Any, target: Target) -> list[Any]:
    from .tvm_cpu import lower

    return lower(spec, configuration, target)


def _bind(spec: SparseMlpSpec, configuration: Any, target: Target, library: Any) -> Any:
    from .bind import bind

    return bind(spec, configuration, target, library)


def _reference(
    spec: SparseMlpSpec, x: torch.Tensor, gate_up: PackedWeight, down: PackedWeight, **options: Any
) -> torch.Tensor:
    return sparse_mlp(spec, x, gate_up.unpack(), down.unpack(), **options)


TVM_CPU = Form(
    name="tvm_cpu",
    backend="tvm_llvm",
    decide=_decide,
    space=space,
    bind=_bind,
    lower=_lower,
    sources=(
        "kernels/sparse_mlp",
        "kernels/quant_matmul",
        "kernels/shared",
        "compiler/backends/tvm_llvm.py",
    ),
)
OPERATOR = Operator("sparse_mlp", SparseMlpSpec, sparse_mlp, (TVM_CPU, reference_form(_reference)))
