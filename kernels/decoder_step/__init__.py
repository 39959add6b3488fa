"""The whole step: embedding, layers and head of a decoder in one parallel launch."""

from __future__ import annotations

from typing import Any

from ...compiler.operator import Declined, Form
from ...compiler.target import Target
from ..attention.space import space as attention_space
from ..quant_matmul.space import prefetches
from ..shared.isa.table import MATRIX, TABLE
from .spec import (
    LAYER_CACHES,
    LAYER_NUMBERS,
    LAYER_SLOTS,
    LAYER_VECTORS,
    LAYER_WEIGHTS,
    DecoderStepSpec,
    LayerFormats,
)  # fmt: skip

__all__ = [
    "LAYER_CACHES", "LAYER_NUMBERS", "LAYER_SLOTS", "LAYER_VECTORS", "LAYER_WEIGHTS", "TVM_CPU",
    "DecoderStepSpec", "LayerFormats",
]  # fmt: skip


def _decide(spec: DecoderStepSpec, target: Target) -> Declined | None:
    if "tvm_llvm" not in target.backends:
        return Declined(f"{target.name} lists no tvm_llvm back end")
    if spec.head_dim % 32:
        return Declined(f"heads of {spec.head_dim} are not whole blocks of 32 columns")
    formats = (*(f for kind in spec.layers for f in kind.all()), spec.embed, spec.head)
    if any(f.bits == 8 and f.zero in ("integer", "minimum") for f in formats):
        return Declined("8-bit weights with a stored zero have no kernel")
    if "bfloat16" in (spec.activation, spec.math) and target.isa not in MATRIX:
        return Declined(f"{target.isa} has no bf16 matrix unit")
    if spec.intermediate % 32:
        return Declined(f"an intermediate size of {spec.intermediate} is not a multiple of 32")
    return None


def _space(spec: DecoderStepSpec, target: Target) -> list[dict[str, Any]]:
    small, large = TABLE[target.isa].tiles[0]
    kv = attention_space(spec.attention(), target)[0]
    shared = {"small_rows": small, "chunk": kv["chunk"], "kv_prefetch": kv["prefetch"]}
    shared |= {"large_rows": large, "block_q": kv["block_q"], "block_k": kv["block_k"]}
    return [shared | ahead for ahead in prefetches(target)]


def _lower(spec: DecoderStepSpec, configuration: Any, target: Target) -> list[Any]:
    from .tvm_cpu import lower

    return lower(spec, configuration, target)


def _bind(spec: DecoderStepSpec, configuration: Any, target: Target, library: Any) -> Any:
    return library


TVM_CPU = Form(
    name="tvm_cpu",
    backend="tvm_llvm",
    decide=_decide,
    space=_space,
    bind=_bind,
    lower=_lower,
    sources=("kernels", "compiler/backends/tvm_llvm.py"),
)
