"""Attention: softmax(q @ k.T) @ v with grouped heads, masks, windows, caps, sinks and four KV types."""

from __future__ import annotations

from typing import Any

from ...compiler.operator import Declined, Form, Operator, reference_form
from ...compiler.target import Target
from ..shared.isa.table import MATRIX
from . import opencl
from .reference import attention, reference_call
from .space import space
from .spec import AttentionSpec
from .tuning import TUNING

__all__ = ["OPERATOR", "TVM_CPU", "AttentionSpec"]


def _decide(spec: AttentionSpec, target: Target) -> Declined | None:
    if "tvm_llvm" not in target.backends:
        return Declined(f"{target.name} lists no tvm_llvm back end")
    if spec.layout not in ("strided", "blocked"):
        return Declined(f"KV layout {spec.layout!r} has no CPU kernel; strided and blocked have")
    if spec.mask == "block":
        return Declined("block masks have no CPU kernel")
    if spec.head_dim % 16 or spec.v_head_dim % 16:
        return Declined(f"head sizes {spec.head_dim} and {spec.v_head_dim} are not multiples of 16")
    if max(spec.head_dim, spec.v_head_dim) > 512 or spec.group > 64:
        return Declined("more than 512 elements a head or 64 heads a group")
    if spec.math == "bfloat16":
        if target.isa not in MATRIX:
            return Declined(f"{target.isa} has no bf16 matrix unit; use math 'float32'")
        if spec.mask == "additive":
            return Declined("an additive bias has no matrix-unit kernel")
    return None


def _lower(spec: AttentionSpec, configuration: Any, target: Target) -> list[Any]:
    from .tvm_cpu import lower

    return lower(spec, configuration, target)


def _bind(spec: AttentionSpec, configuration: Any, target: Target, library: Any) -> Any:
    from .bind import bind

    return bind(spec, configuration, target, library)


TVM_CPU = Form(
    name="tvm_cpu",
    backend="tvm_llvm",
    decide=_decide,
    space=space,
    bind=_bind,
    lower=_lower,
    sources=("kernels/attention", "kernels/shared", "compiler/backends/tvm_llvm.py"),
    tuning=TUNING,
)
OPERATOR = Operator(
    "attention", AttentionSpec, attention, (TVM_CPU, opencl.FORM, reference_form(reference_call))
)
