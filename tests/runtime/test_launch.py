"""Launch: built once, stored, loaded again; what is damaged or cannot be kept still gives right results."""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from edgeformer.compiler.backends import tvm_llvm
from edgeformer.compiler.errors import BuildError, TargetError
from edgeformer.compiler.target import Target, detect
from edgeformer.kernels.quant_matmul import (
    OPERATOR,
    TVM_CPU,
    CanonicalWeight,
    QuantMatmulSpec,
    WeightFormat,
    pack,
)
from edgeformer.kernels.quant_matmul.reference import quant_matmul as reference
from edgeformer.runtime import dispatch, launch, threads

SPEC = QuantMatmulSpec(6, 32, WeightFormat.float("float32"), "float")


@pytest.fixture(autouse=True)
def _fresh(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has bound nothing and whose cache is empty."""
    forget(monkeypatch)
    monkeypatch.setattr(dispatch, "_bound", {})
    monkeypatch.setattr(dispatch, "_choices", {})
    threads.launcher()


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_libraries", {})
    monkeypatch.setattr(launch, "_warned", set())
    monkeypatch.setattr(launch, "statistics", {"built": 0, "loaded": 0})
    store = launch.ArtifactStore()
    monkeypatch.setattr(launch, "store", lambda: store)


def run(target: Target | None = None, spec: QuantMatmulSpec = SPEC) -> None:
    """Bind and check a few rows."""
    target = target or detect()
    call = launch.bind(OPERATOR, TVM_CPU, spec, TVM_CPU.space(spec, target)[0], target)
    check(call, spec)


def check(call, spec: QuantMatmulSpec = SPEC) -> None:
    weight = CanonicalWeight.from_float(torch.randn(spec.n, spec.k), spec.weight)
    x = torch.randn(3, spec.k)
    torch.testing.assert_close(
        call(x, pack(weight), None, None), reference(spec, x, weight), rtol=1e-5, atol=1e-6
    )


def full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_built_once_then_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    run()
    assert launch.statistics == {"built": 1, "loaded": 1}
    forget(monkeypatch)  # as a new process
    run()
    assert launch.statistics == {"built": 0, "loaded": 1}


def test_a_damaged_entry_is_built_again_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    (folder,) = (
        path for path, fields in launch.store().entries() if fields and fields["operator"] == "quant_matmul"
    )
    library = folder / tvm_llvm.LIBRARY_NAME
    data = bytearray(library.read_bytes())
    library.unlink()  # the loaded file stays mapped
    data[len(data) // 2] ^= 0xFF
    library.write_bytes(data)
    forget(monkeypatch)
    with pytest.warns(RuntimeWarning, match="kernels.so is damaged; it is built again") as caught:
        run()
    assert len(caught) == 1 and launch.statistics == {"built": 1, "loaded": 1}
    assert launch.store().verify() == []


def test_a_full_disk_runs_from_a_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.ArtifactStore, "_write_manifest", full_disk)
    with pytest.warns(RuntimeWarning, match="kernels are not kept.*No space left") as caught:
        run()
    assert len(caught) == 1


def test_no_space_anywhere_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_llvm, "run_tool", full_disk)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call = dispatch.bound(OPERATOR, SPEC)
    texts = [str(w.message) for w in caught]
    assert (
        len(texts) == 2
        and "kernels are not kept" in texts[0]
        and "quant_matmul runs its slower form" in texts[1]
    )
    (choice,) = dispatch.choices()
    assert choice.form == "reference" and "No space left" in choice.declined[0][1]
    weight = CanonicalWeight.from_float(torch.randn(6, 32), SPEC.weight)
    x = torch.randn(2, 32)
    assert torch.equal(call(x, pack(weight), None, None), reference(SPEC, x, weight))


def test_without_tvm_the_reference_runs_and_a_request_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "apache-tvm":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.warns(RuntimeWarning, match="apache-tvm is not installed"):
        dispatch.bound(OPERATOR, SPEC)
    with pytest.raises(BuildError, match="pip install"):
        dispatch.bound(OPERATOR, SPEC, "tvm_cpu")


def test_a_broken_compiler_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/bin/false")
    with pytest.warns(RuntimeWarning, match="slower form: /bin/false .*failed"):
        dispatch.bound(OPERATOR, SPEC)
    assert [path for path, _ in launch.store().entries() if "quant" in path.name] == []


def test_without_any_linker_kernels_run_from_the_jit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_llvm, "linker", lambda target: None)
    run()
    assert launch.statistics == {"built": 1, "loaded": 0}
    assert all("quant" not in path.name for path, _ in launch.store().entries())


def test_a_target_that_cannot_run_here_is_refused_before_it_is_built() -> None:
    target = dataclasses.replace(detect(), features=detect().features | {"teleport"}, name="imaginary")
    with pytest.raises(TargetError, match="imaginary needs teleport"):
        run(target)
    assert launch.statistics == {"built": 0, "loaded": 0}


def test_python_threads_build_one_library() -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: run(), range(4)))
    assert launch.statistics == {"built": 1, "loaded": 1}


def test_the_key_holds_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.py").write_text("one")
    (tmp_path / "b.py").write_text("two")
    monkeypatch.setattr(launch, "_PACKAGE", tmp_path)
    digest = launch.source_digest.__wrapped__
    first = digest(("a", "b.py"))
    assert digest(("b.py", "a")) == first
    (tmp_path / "a" / "x.py").write_text("three")
    second = digest(("a", "b.py"))
    (tmp_path / "a" / "x.py").rename(tmp_path / "a" / "y.py")
    assert len({first, second, digest(("a", "b.py"))}) == 3


@pytest.mark.parametrize("operator", ["quant_matmul", "attention", "norm", "rope", "embedding", "sampling"])
def test_the_sources_of_every_form_exist(operator: str) -> None:
    from edgeformer.runtime.registry import operators

    for form in operators()[operator].forms:
        for source in form.sources:
            assert (launch._PACKAGE / source).exists(), source


def test_warn_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for text in ("a", "a", "b", "a"):
            launch.warn_once(text)
    assert [str(w.message) for w in caught] == ["a", "b"]
