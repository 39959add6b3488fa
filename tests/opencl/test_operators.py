"""The other operators on a device: each form's own verification, at odd sizes, on NaN-filled outputs."""

from __future__ import annotations

from typing import Any

import pytest

from edgeformer.compiler.operator import Operator
from edgeformer.compiler.target import Target
from edgeformer.kernels.attention import OPERATOR as ATTENTION
from edgeformer.kernels.attention import AttentionSpec
from edgeformer.kernels.attention.append import OPERATOR as APPEND
from edgeformer.kernels.attention.append import AppendSpec
from edgeformer.kernels.embedding import OPERATOR as EMBEDDING
from edgeformer.kernels.embedding.spec import EmbeddingSpec
from edgeformer.kernels.gated_silu import OPERATOR as GATED_SILU
from edgeformer.kernels.gated_silu.spec import GatedSiluSpec
from edgeformer.kernels.norm import OPERATOR as NORM
from edgeformer.kernels.norm.spec import NormSpec
from edgeformer.kernels.quant_matmul import WeightFormat
from edgeformer.kernels.rope import OPERATOR as ROPE
from edgeformer.kernels.rope.spec import RopeSpec
from edgeformer.kernels.sampling import OPERATOR as SAMPLING
from edgeformer.kernels.sampling.spec import SamplingSpec
from edgeformer.runtime import dispatch, opencl

KV = ("float32", "bfloat16", "float16", "int8")


def attention(heads: int, kv_heads: int, dim: int, kv: str, **flags: Any) -> AttentionSpec:
    return AttentionSpec(
        heads, kv_heads, dim, dim, kv_dtype=kv, mask="causal_lengths", layout="vectors", **flags
    )


CASES: list[tuple[Operator, Any]] = [
    *((NORM, NormSpec("rms", dim, 1e-5)) for dim in (577, 64, 1024)),
    (NORM, NormSpec("rms", 75, 1e-6, weight_offset=1.0, residual=True)),
    (NORM, NormSpec("layer", 76, 1e-5, bias=True)),
    *((ROPE, RopeSpec(dim, part, order)) for dim, part, order in (
        (64, 0, False), (64, 0, True), (80, 32, False), (10, 6, False), (10, 6, True))),
    (GATED_SILU, GatedSiluSpec()),
    *((EMBEDDING, EmbeddingSpec(1000, 147, fmt, "n32.unsigned", factor=2.0)) for fmt in (
        WeightFormat.int4(), WeightFormat.int8(), WeightFormat.blocked(5, 32), WeightFormat.float("float32"),
        WeightFormat.float("bfloat16"))),
    *((SAMPLING, SamplingSpec(v)) for v in (1, 101, 5003)),
    *((APPEND, AppendSpec(64, 64, kv_dtype=kv)) for kv in KV),
    *((ATTENTION, attention(6, 2, 48, kv)) for kv in KV),
    (ATTENTION, attention(9, 3, 64, "bfloat16", window=True)),
    (ATTENTION, attention(4, 4, 80, "float16", softcap=True)),
    (ATTENTION, attention(14, 2, 64, "float32")),
    (ATTENTION, attention(2, 1, 256, "bfloat16")),
]  # fmt: skip


@pytest.mark.parametrize(("operator", "spec"), CASES, ids=lambda x: x.key() if hasattr(x, "key") else x.name)
def test_form_is_right(device: Any, target: Target, operator: Operator, spec: Any) -> None:
    form, choice = dispatch.choose(operator, spec, target, "tvm_opencl")
    program = opencl.load(operator, form, spec, choice.configuration, target)
    assert form.verify is not None
    assert form.verify(spec, choice.configuration, device, program) == ""
