"""The default suite: its files, what a killed one keeps, and that the defaults stay small."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeformer.bench import ops as bench_ops_module
from edgeformer.bench import suite as suite_module
from edgeformer.bench.op_cases import Case, cases, shapes
from edgeformer.bench.ops import OpsOptions, bench_ops
from edgeformer.bench.options import Options
from edgeformer.bench.probes import Limits
from edgeformer.bench.suite import suite

LIMITS = Limits(threads=2, read_bandwidth=1e10, int8_peak=1e12, float_peak=1e11)


def named(options: OpsOptions) -> list[str]:
    args = (options.operators, options.models, options.rows, options.contexts, options.formats, None, 1 << 25)
    return [case.name for case in cases(*args)]


def test_the_default_is_a_part_of_everything():
    some, everything = named(OpsOptions()), named(OpsOptions.everything())
    assert len(some) <= 60 and set(some) < set(everything)
    assert {name.split()[1] for name in everything} == set(shapes())
    assert any(name.endswith("m4096") for name in everything) and any(
        "ctx32768" in name for name in everything
    )
    assert OpsOptions.everything(rows=(1,)).rows == (1,)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The cases that were measured, each as a row of nothing."""
    log: list[str] = []

    def measure(case: Case, form: str, repeats: int) -> list[dict[str, Any]]:
        if "m512" in case.name and "stop" in log:
            raise KeyboardInterrupt
        log.append(case.name)
        names = bench_ops_module._names(case, "edgeformer", form)
        return [names | bench_ops_module._nothing() | {"status": "failed", "proof": "none", "error": "x"}]

    monkeypatch.setenv("EDGEFORMER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(bench_ops_module, "_measure", measure)
    monkeypatch.setattr(bench_ops_module, "measure_limits", lambda *_, **__: LIMITS)
    monkeypatch.setattr(bench_ops_module, "fixed_probe", lambda threads: {"compute": 1.0})
    return log


def test_killed_kernel_runs_go_on(measured: list[str]):
    options: dict[str, Any] = {"operators": ("norm", "rope"), "models": ("smollm2-135m",), "threads": 2}
    measured.append("stop")
    with pytest.raises(KeyboardInterrupt):
        bench_ops(OpsOptions(**options))
    assert measured == ["stop", "norm smollm2-135m fp32 m1", "norm smollm2-135m fp32 m8"]
    measured.clear()
    rows = bench_ops(OpsOptions(**options, resume=True))
    assert len(measured) == 4 and "norm smollm2-135m fp32 m8" not in measured
    assert [row["test"] for row in rows] == named(OpsOptions(**options))
    measured.clear()
    bench_ops(OpsOptions(**options, resume=True))  # the finished run is forgotten
    assert len(measured) == 6


def test_the_suite_writes_rows_and_a_page_and_resumes(
    pretend: Callable[..., list[dict[str, Any]]], measured: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    pytest.importorskip("matplotlib")
    runs: list[Options] = []

    def bench(model: Path, options: Options, progress: Any) -> list[dict[str, Any]]:
        runs.append(options)
        return pretend(prompt=(8,), generate=(16,))

    monkeypatch.setattr(suite_module, "bench", bench)
    ops = OpsOptions(operators=("norm",), models=("smollm2-135m",))
    written = suite(tmp_path / "model.gguf", Options(), ops, tmp_path / "out")
    assert [path.name for path in written] == ["model.json", "ops.json", "report.html"]
    assert [row["kind"] for row in json.loads(written[1].read_text())] == ["op"] * 3
    assert "norm smollm2-135m" in written[2].read_text() and "pp8" in written[2].read_text()
    written[1].unlink()
    suite(tmp_path / "model.gguf", Options(resume=True), ops, tmp_path / "out")
    assert len(runs) == 1 and len(measured) == 6
    suite(tmp_path / "model.gguf", Options(), ops, tmp_path / "out")
    assert len(runs) == 2 and len(measured) == 9
