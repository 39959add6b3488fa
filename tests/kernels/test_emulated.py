"""Arm: every operator that a decoder needs, cross-compiled, run under qemu, compared with the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeformer.compiler import emulator
from edgeformer.compiler.backends import tvm_llvm
from edgeformer.compiler.emulator import EmulatedLibrary
from edgeformer.compiler.operator import Form
from edgeformer.compiler.target import Target, known_targets
from edgeformer.kernels.attention import TVM_CPU as ATTENTION
from edgeformer.kernels.attention import AttentionSpec
from edgeformer.kernels.attention.append import TVM_CPU as APPEND
from edgeformer.kernels.attention.append import AppendSpec
from edgeformer.kernels.attention.append import reference as append
from edgeformer.kernels.embedding import tvm_cpu as embedding_form
from edgeformer.kernels.embedding.reference import embedding
from edgeformer.kernels.embedding.spec import EmbeddingSpec
from edgeformer.kernels.norm import tvm_cpu as norm_form
from edgeformer.kernels.norm.reference import norm
from edgeformer.kernels.norm.spec import NormSpec
from edgeformer.kernels.quant_matmul import (
    TVM_CPU,
    CanonicalWeight,
    QuantMatmulSpec,
    WeightFormat,
    pack,
)
from edgeformer.kernels.quant_matmul.reference import quant_matmul as reference
from edgeformer.kernels.rope import tvm_cpu as rope_form
from edgeformer.kernels.rope.reference import rope
from edgeformer.kernels.rope.spec import RopeSpec
from edgeformer.kernels.sampling import tvm_cpu as sampling_form
from edgeformer.kernels.sampling.reference import sample
from edgeformer.kernels.sampling.spec import SamplingOptions, SamplingSpec

from .attention.conftest import check, make_problem

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))
TARGETS = ["raspberry-pi-4", "raspberry-pi-5", "graviton4"]  # neon, dotprod, i8mm (and SVE2)
targets = pytest.mark.parametrize("name", TARGETS)
PRODUCTS = {
    "int4": QuantMatmulSpec(100, 96, WeightFormat.int4()),
    "int8": QuantMatmulSpec(90, 100, WeightFormat.int8(), x_dtype="bfloat16", bias=True),
    "int4-minimum-pair": QuantMatmulSpec(
        64, 70, WeightFormat.int4(zero="minimum"), epilogue="silu_pair", residual=True
    ),
    "int6-blocked": QuantMatmulSpec(70, 520, WeightFormat.blocked(6, 16, "constant")),
    "float16": QuantMatmulSpec(36, 45, WeightFormat.float("float16"), "float"),
}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Callable[..., Any]]:
    """Build a form for a target and bind it to the library under qemu."""

    @functools.cache
    def build(form: Form, spec: Any, name: str) -> Callable[..., Any]:
        target, folder = Target.parse(name), Path(tmp_path_factory.mktemp("arm"))
        configuration = form.space(spec, target)[0]
        assert form.lower is not None and form.decide(spec, target) is None
        tvm_llvm.build(form.lower(spec, configuration, target), target, folder)
        library = EmulatedLibrary(folder / tvm_llvm.LIBRARY_NAME, emulator.cpu_for(target), threads=2)
        return form.bind(spec, configuration, target, library)

    return build


@pytest.fixture
def nan_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN: 0xff bytes in scratch memory."""
    empty = torch.empty

    def filled(*shape: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        made = empty(*shape, dtype=dtype)
        if dtype == torch.uint8:
            return made.fill_(255)
        return made.fill_(torch.nan) if dtype.is_floating_point else made

    monkeypatch.setattr(torch, "empty", filled)


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error <= tolerance, f"relative error {error:.2e}"


def test_targets_called_emulated_are_those_that_run_here() -> None:
    parsed = [Target.parse(name) for name in known_targets()]
    assert {t.name for t in parsed if t.arch == "aarch64" and t.proof == "emulated"} == set(TARGETS)


@targets
@pytest.mark.parametrize("product", PRODUCTS)
def test_quant_matmul(name: str, product: str, built: Any, nan_filled: None) -> None:
    torch.manual_seed(1)
    spec, target = PRODUCTS[product], Target.parse(name)
    call = built(TVM_CPU, spec, name)
    weight = CanonicalWeight.from_float(torch.randn(spec.n, spec.k), spec.weight)
    packed = pack(weight, target, pair=spec.epilogue == "silu_pair")
    for m in (1, 3, 35):
        x = torch.randn(m, spec.k).to(getattr(torch, spec.x_dtype))
        bias = torch.randn(spec.n) if spec.bias else None
        residual = torch.randn(m, spec.n_out).to(x.dtype) if spec.residual else None
        want = reference(spec, x.float(), weight, bias, None if residual is None else residual.float())
        assert_close(call(x, packed, bias, residual), want, 1e-5 if x.dtype == torch.float32 else 2**-8)


@targets
@pytest.mark.parametrize("kv", ["bfloat16", "int8"])
def test_attention(name: str, kv: str, built: Any) -> None:
    spec = AttentionSpec(6, 2, 64, 64, "float32", kv, "causal", "blocked")
    call = built(ATTENTION, spec, name)
    for batch, tq, tk in ((1, 1, 1), (1, 1, 77), (2, 3, 19), (1, 37, 41)):
        check(make_problem(spec, batch, tq, tk), call)


@targets
def test_norm_rope_and_embedding(name: str, built: Any, nan_filled: None) -> None:
    torch.manual_seed(2)
    spec = NormSpec("rms", 45, 1e-5)
    x, weight = torch.randn(5, 45), torch.randn(45)
    got = built(norm_form.FORM, spec, name)(x, weight, None)
    assert_close(got, norm(spec, x, weight, None), 1e-5)
    turn = RopeSpec(70, 46)
    x, angles = torch.randn(2, 3, 5, 70), torch.rand(5, 23) * 100
    got = built(rope_form.FORM, turn, name)(x, angles.cos(), angles.sin())
    assert_close(got, rope(turn, x, angles.cos(), angles.sin()), 1e-5)
    for fmt in (WeightFormat.int4(), WeightFormat.int8()):
        table = pack(CanonicalWeight.from_float(torch.randn(77, 141), fmt), Target.parse(name))
        look_up, ids = EmbeddingSpec.of(table), torch.tensor([[76, 0, 5]])
        got = built(embedding_form.FORM, look_up, name)(ids, table)
        assert_close(got, embedding(look_up, ids, table), 1e-5)


@targets
@pytest.mark.parametrize("kv", ["bfloat16", "int8"])
def test_append(name: str, kv: str, built: Any) -> None:
    torch.manual_seed(3)
    spec = AppendSpec(48, 16, "float32", kv)
    call = built(APPEND, spec, name)
    for batch, tokens, position in ((1, 1, 0), (2, 3, 15)):
        k, v = torch.randn(batch, 2, tokens, 48), torch.randn(batch, 2, tokens, 16)
        k[0, 0, 0] = 0  # its scale is 0
        results = []
        for run in (call, functools.partial(append, spec)):
            caches = [torch.zeros(batch, 2, 2, 48, 16), torch.zeros(batch, 2, 32, 16)]
            caches = [cache.to(getattr(torch, kv)) for cache in caches]
            scales = [torch.full((batch, 2, 32), 9.0) if kv == "int8" else None for _ in range(2)]
            run(k, v, caches[0], caches[1], scales[0], scales[1], position)
            results.append([*caches, *(s for s in scales if s is not None)])
        assert all(torch.equal(ours, expected) for ours, expected in zip(*results, strict=True))


@targets
def test_sampling(name: str, built: Any) -> None:
    spec = SamplingSpec(1003)
    call = built(sampling_form.FORM, spec, name)
    for rows, options in (
        (1, SamplingOptions()),
        (3, SamplingOptions(temperature=0.8, top_k=50, top_p=0.9, min_p=0.05, repetition_penalty=1.3)),
    ):
        x = torch.randn(rows, 1003, generator=torch.Generator().manual_seed(4)) * 3
        previous = torch.randint(-1, 1003, (rows, 9))
        assert torch.equal(call(x, options, previous, 7, 1), sample(spec, x, options, previous, 7, 1))
