"""Multi-head latent attention (MLA): attention whose cache is one latent a token, for all heads."""

from __future__ import annotations

from typing import Any

from ...compiler.operator import Declined, Form, Operator, reference_form
from ...compiler.target import Target
from ..shared.isa.table import MATRIX
from .reference import mla, reference_call
from .space import space
from .spec import MlaSpec, cheaper_mode

__all__ = ["OPERATOR", "TVM_CPU", "MlaSpec", "cheaper_mode"]


def _decide(spec: MlaSpec, target: Target) -> Declined | None:
    if "tvm_llvm" not in target.backends:
        return Declined(f"{target.name} lists no tvm_llvm back end")
    sizes = (spec.kv_lora_rank, spec.qk_nope_head_dim, spec.qk_rope_head_dim, spec.v_head_dim)
    if any(size % 16 for size in sizes):
        return Declined(f"the sizes {sizes} (rank, nope, rope, value) are not all multiples of 16")
    if max(sizes) > 1024:
        return Declined(f"a size of {sizes} is above 1024")
    if spec.math == "bfloat16" and spec.mode == "absorbed":
        return Declined("the absorbed mode computes in fp32; use math 'float32'")
    if spec.math == "bfloat16" and target.isa not in MATRIX:
        return Declined(f"{target.isa} has no bf16 matrix unit; use math 'float32'")
    return None


def _lower(spec: MlaSpec, configuration: Any, target: Target) -> list[Any]:
    from .tvm_cpu import lower

    return lower(spec, configuration, target)


def _bind(spec: MlaSpec, configuration: Any, target: Target, library: Any) -> Any:
    from .bind import bind

    return bind(spec, configuration, target, library)


TVM_CPU = Form(
    name="tvm_cpu",
    backend="tvm_llvm",
    decide=_decide,
    space=space,
    bind=_bind,
    lower=_lower,
    sources=("kernels/mla", "kernels/attention", "kernels/shared", "compiler/backends/tvm_llvm.py"),
)
OPERATOR = Operator("mla", MlaSpec, mla, (TVM_CPU, reference_form(reference_call)))
