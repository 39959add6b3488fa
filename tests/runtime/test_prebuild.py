"""Building ahead: a model then only loads; a child that fails leaves its kernel to the parent."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from edgeformer.compiler.backends import tvm_llvm
from edgeformer.compiler.target import detect
from edgeformer.kernels.quant_matmul import (
    OPERATOR,
    TVM_CPU,
    CanonicalWeight,
    QuantMatmulSpec,
    WeightFormat,
    pack,
)
from edgeformer.runtime import launch, prebuild

SPECS = [QuantMatmulSpec(n, 32, WeightFormat.float("float32"), "float") for n in (6, 7)]
WANTED = [("quant_matmul", TVM_CPU, spec) for spec in SPECS]


@pytest.fixture(autouse=True)
def _fresh(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_libraries", {})
    monkeypatch.setattr(launch, "statistics", {"built": 0, "loaded": 0})
    store = launch.ArtifactStore()
    monkeypatch.setattr(launch, "store", lambda: store)
    monkeypatch.setattr(prebuild, "available_cores", lambda: 2)
    monkeypatch.setattr(prebuild, "available_memory", lambda: 8 << 30)


def run(spec: QuantMatmulSpec) -> None:
    call = launch.bind(OPERATOR, TVM_CPU, spec, TVM_CPU.space(spec, detect())[0], detect())
    weight, x = torch.randn(spec.n, spec.k), torch.randn(3, spec.k)
    got = call(x, pack(CanonicalWeight.from_float(weight, spec.weight)), None, None)
    torch.testing.assert_close(got, x @ weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(tvm_llvm.linker(detect()) is None, reason="needs a linker")
def test_what_is_built_ahead_is_only_loaded_later() -> None:
    assert not any(launch.is_built(*item, detect()) for item in WANTED)
    assert prebuild.prebuild([*WANTED, *WANTED], detect(), worth=2) == 2
    assert all(launch.is_built(*item, detect()) for item in WANTED)
    for spec in SPECS:
        run(spec)
    assert launch.statistics == {"built": 0, "loaded": 2}
    assert prebuild.prebuild(WANTED, detect(), worth=1) == 0


@pytest.mark.skipif(tvm_llvm.linker(detect()) is None, reason="needs a linker")
def test_a_child_that_fails_leaves_its_kernel_to_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    job = prebuild.job_of

    def broken(operator, form, spec, target):
        found = job(operator, form, spec, target)
        return dataclasses.replace(found, module="no.such.module") if spec is SPECS[0] else found

    monkeypatch.setattr(prebuild, "job_of", broken)
    assert prebuild.prebuild(WANTED, detect(), worth=2) == 1
    assert not launch.is_built(*WANTED[0], detect())
    run(SPECS[0])
    assert launch.statistics["built"] == 1


def test_few_kernels_and_little_memory_start_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prebuild, "Child", lambda entry: pytest.fail("a child was started"))
    assert prebuild.prebuild(WANTED, detect()) == 0
    monkeypatch.setattr(prebuild, "available_memory", lambda: 1 << 30)
    assert prebuild.prebuild(WANTED, detect(), worth=1) == 0
