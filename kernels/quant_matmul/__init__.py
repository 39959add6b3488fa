"""Quantised matmul: y = epilogue(x @ W.T) for integer and float weights."""

from __future__ import annotations

from typing import Any

import torch

from ...compiler.operator import Declined, Form, Operator, reference_form
from ...compiler.target import Target
from ..shared.isa.table import MATRIX
from . import opencl
from .packing import PackedWeight, pack, pack_float
from .reference import quant_matmul as reference
from .space import space
from .spec import QuantMatmulSpec
from .tuning import TUNING
from .weight_format import CanonicalWeight, WeightFormat

__all__ = [
    "OPERATOR",
    "CanonicalWeight",
    "PackedWeight",
    "QuantMatmulSpec",
    "WeightFormat",
    "pack",
    "pack_float",
]


def _decide(spec: QuantMatmulSpec, target: Target) -> Declined | None:
    if "tvm_llvm" not in target.backends:
        return Declined(f"{target.name} lists no tvm_llvm back end")
    if spec.weight.bits == 8 and spec.weight.zero in ("integer", "minimum"):
        return Declined("8-bit weights with a stored zero have no kernel")
    if spec.activation == "bfloat16" and target.isa not in MATRIX:
        return Declined(f"{target.isa} has no bf16 matrix unit; use activation 'int8' or 'float'")
    return None


def _lower(spec: QuantMatmulSpec, configuration: Any, target: Target) -> list[Any]:
    from .tvm_cpu import lower

    return lower(spec, configuration, target)


def _bind(spec: QuantMatmulSpec, configuration: Any, target: Target, library: Any) -> Any:
    from .bind import bind

    return bind(spec, configuration, target, library)


def _reference(
    spec: QuantMatmulSpec, x: torch.Tensor, weight: PackedWeight, bias: Any, residual: Any
) -> torch.Tensor:
    return reference(spec, x, weight.unpack(), bias, residual)


TVM_CPU = Form(
    name="tvm_cpu",
    backend="tvm_llvm",
    decide=_decide,
    space=space,
    bind=_bind,
    lower=_lower,
    sources=("kernels/quant_matmul", "kernels/shared", "compiler/backends/tvm_llvm.py"),
    tuning=TUNING,
)
OPERATOR = Operator(
    "quant_matmul", QuantMatmulSpec, reference, (TVM_CPU, opencl.FORM, reference_form(_reference))
)
