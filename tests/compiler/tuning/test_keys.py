"""What makes a record or a built kernel be found again: real kernels, real stores, real checks in a child."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeformer.compiler.backends import tvm_llvm
from edgeformer.compiler.records import Record, RecordStore
from edgeformer.compiler.space import Axis, Space
from edgeformer.compiler.target import detect
from edgeformer.kernels.quant_matmul import OPERATOR, TVM_CPU, QuantMatmulSpec, WeightFormat
from edgeformer.runtime import dispatch, launch, recorded, threads, tuning
from edgeformer.runtime.tuning import wanted

pytestmark = pytest.mark.real
SPEC = QuantMatmulSpec(32, 64, WeightFormat.int4(), "int8")
SIZES = {"m": 1}
FOUND = "exact record (yours)"


@pytest.fixture(autouse=True)
def _fresh(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores of an empty cache folder, and nothing loaded."""
    new_process(monkeypatch)
    threads.launcher()


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what this process has loaded, built and read."""
    monkeypatch.setattr(launch, "_libraries", {})
    monkeypatch.setattr(launch, "statistics", {"built": 0, "loaded": 0})
    store = launch.ArtifactStore()
    monkeypatch.setattr(launch, "store", lambda: store)
    recorded.forget()
    launch.source_digest.cache_clear()


def put_record(m: int = 1, **changes: Any) -> Record:
    """Store a record of another configuration than the default: the last one."""
    found = wanted(OPERATOR, TVM_CPU, SPEC, {"m": m}, detect(), torch.get_num_threads())
    assert found is not None
    chosen = list(found[1])[-1]
    assert chosen != found[1].default
    given = found[0].empty(found[1].essential(chosen))
    record = dataclasses.replace(given, **{"versions": dict(tuning.versions()), **changes})
    assert RecordStore().put(record)
    recorded.forget()
    return record


def look(form: Any = TVM_CPU) -> tuple[dict[str, Any], str]:
    return recorded.configuration(OPERATOR, form, SPEC, SIZES, detect())


def built(configuration: dict[str, Any]) -> dict[str, int]:
    """Bind as a call does; return what that took."""
    launch.bind(OPERATOR, TVM_CPU, SPEC, configuration, detect())
    return dict(launch.statistics)


def test_a_comment_in_a_kernel_is_an_artifact_miss_and_a_record_hit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "package"
    for source in TVM_CPU.sources:
        original = launch._PACKAGE / source
        place = shutil.copytree if original.is_dir() else shutil.copyfile
        (copy / source).parent.mkdir(parents=True, exist_ok=True)
        place(original, copy / source)
    monkeypatch.setattr(launch, "_PACKAGE", copy)
    record = put_record()
    configuration, how = look()
    assert how == FOUND and configuration.items() >= record.configuration.items()
    assert built(configuration) == {"built": 1, "loaded": 1}
    new_process(monkeypatch)
    assert built(look()[0]) == {"built": 0, "loaded": 1}  # the second run compiles nothing

    with open(copy / "kernels/quant_matmul/tvm_cpu_rows.py", "a") as file:
        file.write("# a comment\n")
    new_process(monkeypatch)
    assert look() == (configuration, FOUND)
    assert built(configuration) == {"built": 1, "loaded": 1}
    launch.source_digest.cache_clear()


def test_an_axis_added_is_a_record_miss() -> None:
    put_record()

    def wider(spec: Any, target: Any) -> Space:
        given = TVM_CPU.space(spec, target)
        assert isinstance(given, Space)
        return Space((*given.axes, Axis("unroll", (1, 2))), given.constraints)

    form = dataclasses.replace(TVM_CPU, space=wider)
    assert look(form) == (wider(SPEC, detect()).default, "default")
    assert look()[1] == FOUND


def test_another_torch_is_a_hit_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    record = put_record(versions=tuning.versions() | {"torch": "1.0.0"})
    configuration, how = look()
    assert how == FOUND and configuration.items() >= record.configuration.items()
    built(configuration)
    new_process(monkeypatch)
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert look()[1] == FOUND and built(configuration) == {"built": 0, "loaded": 1}
    assert "torch" not in tvm_llvm.versions()


def test_another_minor_version_of_tvm_is_checked_once_and_then_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = put_record(versions=tuning.versions() | {"apache-tvm": "0.26.1"})
    about = f"{tuning.tools()} {SPEC.key()}"
    assert RecordStore().is_verified(record, about) is None
    configuration, how = look()  # a child process builds it and compares it with the reference
    assert how == FOUND and configuration.items() >= record.configuration.items()
    assert RecordStore().is_verified(record, about) is True
    recorded.forget()
    monkeypatch.setattr(tuning, "ChildEvaluator", None)  # not again
    assert look() == (configuration, how)
    assert "built" in launch.statistics and launch.statistics["built"] == 0  # the check built aside


def test_a_patch_release_of_tvm_needs_no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    now = tuning.versions()["apache-tvm"].split(".")
    put_record(versions=tuning.versions() | {"apache-tvm": ".".join([*now[:2], "99"])})
    monkeypatch.setattr(tuning, "ChildEvaluator", None)
    assert look()[1] == FOUND


def test_a_stale_record_whose_kernel_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code that is made of the record's configuration now gives wrong results; it is really compiled."""
    import sys

    from . import planted

    record = put_record(versions=tuning.versions() | {"apache-tvm": "0.26.1"})
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    given = tuning.Request

    def request(*arguments: Any, **options: Any) -> Any:
        return given(*arguments, **options, provider="planted:broken")

    monkeypatch.setattr(tuning, "Request", request)
    configuration, how = look()
    assert how == "default" and configuration == TVM_CPU.space(SPEC, detect())[0]
    assert RecordStore().is_verified(record, f"{tuning.tools()} {SPEC.key()}") is False
    found = recorded.explain(OPERATOR, TVM_CPU, SPEC, SIZES, detect(), torch.get_num_threads(), check=False)
    assert [problem for _, problem in found] == ["its results are wrong on this device"]
    assert planted.broken()["quant_matmul"].name == "quant_matmul"


def test_records_of_several_sizes_travel_with_a_compiled_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is bound for one number of rows brings the libraries of all of them, and each is chosen there."""
    sizes = [{"m": m} for m in (1, 3, 8, 100, 600)]
    put_record(1)
    put_record(8)
    expected = [recorded.configuration(OPERATOR, TVM_CPU, SPEC, at, detect())[0] for at in sizes]
    assert len({json.dumps(c, sort_keys=True) for c in expected}) == 3  # two records and the default
    monkeypatch.setattr(dispatch, "_bound", {})
    with launch.recording() as used:
        dispatch.bound(OPERATOR, SPEC, None, {"m": 4})
    assert len(used) == 3
    RecordStore().prune()
    new_process(monkeypatch)
    monkeypatch.setattr(launch, "_travelled", {})
    launch.use_travelled(used.values(), detect())
    found = [recorded.configuration(OPERATOR, TVM_CPU, SPEC, at, detect())[0] for at in sizes]
    assert found == expected
    monkeypatch.setattr(launch, "_library", None)  # nothing is built or looked up in the store
    for configuration in found:
        launch.bind(OPERATOR, TVM_CPU, SPEC, configuration, detect())
