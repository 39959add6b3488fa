"""The whole step: embedding, layers and head of a decoder in one parallel launch."""

from __future__ import annotations

from typing import Any

from ...compiler.operator import Declined, Form, Sizes, Tuning
from ...compiler.space import Axis, Constraint, Space
from ...compiler.target import Target
from ..attention.space import space as attention_space
from ..quant_matmul.space import (
    few_prefetch,
    int8_prefetch_axis,
    many_axes,
    prefetch_axes,
    prefetch_constraints,
)
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
    "DECODE", "LAYER_CACHES", "LAYER_NUMBERS", "LAYER_SLOTS", "LAYER_VECTORS", "LAYER_WEIGHTS", "PREFILL",
    "STEP_ROWS", "TVM_CPU", "DecoderStepSpec", "LayerFormats",
]  # fmt: skip

STEP_ROWS = 8  # up to so many rows are a step, more a chunk
DECODE, PREFILL = "decode", "prefill"


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


def _space(spec: DecoderStepSpec, target: Target) -> Space:
    """Return the configurations of steps (few rows) and chunks (many), the default first."""
    small = TABLE[target.isa].tiles[0][0]
    attention = attention_space(spec.attention(), target)
    kv = {axis.name: axis.values for axis in attention.axes}
    decode, prefill = (DECODE,), (PREFILL,)
    axes = (
        Axis("small_rows", (small,)),  # the arena's layout depends on it
        Axis("chunk", kv["chunk"], decode),
        Axis("kv_prefetch", kv["prefetch"], decode),
        *_prefetch_axes(spec, target),
        *many_axes(target, prefill if spec.activation != "bfloat16" else ("none",)),
        Axis("block_q", kv["block_q"], prefill),
        Axis("block_k", kv["block_k"], prefill),
        Axis("threads", _thread_counts(target.cores)),
    )
    constraints = (
        *prefetch_constraints(target, few=False),
        *(
            Constraint(constraint.name, lambda c, holds=constraint.holds: holds(c))
            for constraint in attention.constraints
        ),
    )
    return Space(axes, constraints)


def _prefetch_axes(spec: DecoderStepSpec, target: Target) -> tuple[Axis, ...]:
    """Return the axes of all weights, and where these differ that of those of 8 bits."""
    bits = {product.weight.bits for product in (*spec.products(), spec.matmul("head"))}
    least = min(bits)
    axes = (*prefetch_axes(target, (DECODE,), few=False, bits=least), *few_prefetch(target, least))
    return (*axes, int8_prefetch_axis(target, (DECODE,))) if 8 in bits and len(bits) > 1 else axes


def _thread_counts(cores: int) -> tuple[int, ...]:
    """Return how many threads a phase may take; 0, the default, is all that are set. The code is the same."""
    return (0, *dict.fromkeys(n for n in (cores - 1, cores // 2, cores // 4) if 0 < n < cores))


def _phase(spec: DecoderStepSpec, sizes: Sizes) -> str:
    return DECODE if sizes["m"] <= STEP_ROWS else PREFILL


def _family(spec: DecoderStepSpec, target: Target) -> tuple[str, dict[str, int]]:
    key = spec.key().split(" ")
    sizes = {"hidden": spec.hidden, "intermediate": spec.intermediate, "vocab": spec.vocab}
    return " ".join(key[3:]), sizes


def _functions(spec: DecoderStepSpec, phase: str) -> tuple[str, ...]:
    return ("step_1",) if phase == DECODE else ("chunk",)


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
    tuning=Tuning(_phase, _family, _functions),
)
