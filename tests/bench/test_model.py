"""The bench on engines that only pretend: order, rows, limits and refusals. No test depends on time."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest

from edgeformer.bench import probes
from edgeformer.bench.child import EngineError, Shape, Timing
from edgeformer.bench.model import MeasurementError, require_plausible
from edgeformer.bench.options import Options
from edgeformer.bench.peers.llama_cpp import LlamaCppEngine, missing_isa
from edgeformer.bench.probes import Limits
from edgeformer.bench.table import render
from edgeformer.bench.work import Test, fractions, work_of_file
from edgeformer.compiler.errors import UnsupportedError
from edgeformer.compiler.target import detect
from edgeformer.kernels.shared.isa.table import MATRIX
from edgeformer.runtime import dispatch

from .conftest import LIMITS, WORK


def test_engines_take_turns_and_limits_are_measured_around(pretend: Any, log: list[str]):
    pretend(prompt=(0,), generate=(16,))
    assert log == [
        "limits", "warm edgeformer", "warm llama.cpp", "edgeformer", "llama.cpp", "edgeformer", "llama.cpp",
        "edgeformer", "llama.cpp", "edgeformer", "limits",
    ]  # fmt: skip


def test_rows_have_the_median_the_spread_and_where_they_come_from(pretend: Any):
    rows = pretend(prompt=(512,), generate=(120,))
    assert [(r["engine"], r["test"]) for r in rows] == [
        ("edgeformer", "pp512"), ("llama.cpp", "pp512"), ("edgeformer", "tg120"), ("llama.cpp", "tg120")
    ]  # fmt: skip
    ours = rows[2]
    assert ours["tokens_per_second"] == 50.0
    assert ours["spread"] == pytest.approx(15.0)
    assert sorted(ours["samples"]) == [30.0, 40.0, 60.0, 60.0]
    bytes_a_step = 10**9 + 1000 * 60.5
    assert ours["limit_fraction"] == pytest.approx(50 * bytes_a_step / 5e10, rel=1e-3)
    assert ours["limits"]["rounds"] == 3
    assert ours["limits"]["matrix_peak"] is None
    needed = {"schema_version", "run_id", "model", "size", "threads", "versions", "device", "options"}
    needed |= {"commit", "governor", "fingerprint", "time", "records", "device_check", "environment"}
    assert needed <= ours.keys()
    assert ours["records"] == {"default": 2}
    assert ours["schema_version"] == 2 and ours["proof"] == "run"
    assert len({r["run_id"] for r in rows}) == 1


def test_other_versions_of_the_tools_are_another_run(pretend: Any, monkeypatch: pytest.MonkeyPatch):
    from edgeformer.bench import model

    same = model._identity(Path(__file__), Options())
    assert same == model._identity(Path(__file__), Options())
    monkeypatch.setattr(model, "versions", lambda: {"llama-cpp-python": "another"})
    assert same != model._identity(Path(__file__), Options())


def test_energy_is_never_zero(pretend: Any):
    unknown = pretend(prompt=(0,), generate=(120,))[0]["energy"]
    assert unknown == {"status": "unavailable", "source": "no counter here", "joules_per_token": None}
    guessed = pretend(prompt=(0,), generate=(120,), watts=20.0)[0]["energy"]
    assert guessed["status"] == "estimated"
    assert guessed["joules_per_token"] == pytest.approx(20 * 3.0 / 120)


def test_first_token_scenarios_and_quality_stand_beside_the_speed(pretend: Any):
    rows = pretend(
        prompt=(64,), generate=(5,), ttft=True, quality_tokens=700, queries=16,
        scenarios=("single-stream", "multi-stream", "offline"),
    )  # fmt: skip
    ours = [row for row in rows if row["engine"] == "edgeformer"]
    assert [row["test"] for row in ours] == ["pp64", "tg5", "single-stream", "multi-stream", "offline"]
    assert ours[0]["first_token"]["warm_seconds"] == 0.5
    assert len(ours[0]["first_token"]["cold_samples"]) == 2
    assert ours[0]["peak_memory"] == 10**8
    assert ours[0]["quality"]["tokens"] == 698  # 511 of a window of 512, 187 of one of 188
    assert ours[0]["quality"]["mean_kl"] == 0.0 and ours[0]["quality"]["top1_agreement"] == 1.0
    single, multi, offline = (row["scenario"] for row in ours[2:])
    assert (single["queries"], multi["queries"], offline["queries"]) == (16, 2, 2)
    assert single["metric"] == {"latency_p90": pytest.approx(0.9)}
    assert multi["metric"] == {"latency_p99": pytest.approx(0.5 + 0.1 * 4 * 8)}
    assert offline["metric"] == {"samples_per_second": pytest.approx(8 / 3.7, rel=1e-3)}
    assert multi["few"] and "too few queries" in ours[3]["warnings"][0]


def test_tables(pretend: Any):
    rows = pretend(prompt=(), generate=(120,))
    assert json.loads(render(rows, "json")) == rows
    assert [json.loads(line) for line in render(rows, "jsonl").splitlines()] == rows
    table = render(rows, "md").splitlines()
    assert "| 2.00 |" in table[0].replace("x llama.cpp", "2.00")
    assert "| edgeformer | 2 | tg120 | 35.0 ± 15.0 |" in table[2]
    assert any("energy is unavailable: no counter here" in line for line in table)
    parsed = list(csv.DictReader(io.StringIO(render(rows, "csv"))))
    assert [row["test"] for row in parsed] == ["tg120", "tg120"]
    assert json.loads(parsed[0]["limits"])["read_bandwidth"] == 5e10


def test_a_missing_peer_has_a_row_with_the_command(pretend: Any):
    rows = pretend(prompt=(0,), generate=(16,), peers=("openvino", "llama.cpp"))
    missing = rows[1]
    assert (missing["engine"], missing["status"]) == ("openvino", "missing")
    assert missing["tokens_per_second"] is None and missing["limit_fraction"] is None
    assert "pip install openvino-genai" in missing["error"]
    assert [row["status"] for row in rows] == ["ok", "missing", "ok"]
    assert "pip install openvino-genai" in render(rows, "md")


def test_a_peer_that_dies_is_reopened_and_the_run_goes_on(pretend: Any, engines: dict[str, Any]):
    peer = engines["llama.cpp"]
    peer.fails["pp512"] = EngineError("llama.cpp stopped (exit -11): no word")
    rows = pretend(prompt=(512,), generate=(16,))
    by_test = {(row["engine"], row["test"]): row for row in rows}
    assert by_test["llama.cpp", "pp512"]["status"] == "failed"
    assert "exit -11" in by_test["llama.cpp", "pp512"]["error"]
    assert by_test["llama.cpp", "tg16"]["status"] == "ok" and peer.opened == 1
    assert by_test["edgeformer", "pp512"]["status"] == "ok"


def test_a_peer_that_dies_twice_is_given_up(pretend: Any, engines: dict[str, Any]):
    peer = engines["llama.cpp"]
    peer.fails = {
        name: EngineError("llama.cpp gave no answer", "timeout") for name in ("pp512", "pp8", "tg16")
    }
    rows = pretend(prompt=(512, 8), generate=(16,))
    theirs = [row for row in rows if row["engine"] == "llama.cpp"]
    assert [row["status"] for row in theirs] == ["timeout"] * 3
    assert "given up" in theirs[2]["error"] and peer.opened == 1


def test_a_killed_run_goes_on(pretend: Any, engines: dict[str, Any], log: list[str]):
    ours = engines["edgeformer"]
    good, ours.run = ours.run, None

    def killed(test: Test) -> Timing:
        if test.name == "tg16":
            raise KeyboardInterrupt
        return good(test)

    ours.run = killed
    with pytest.raises(KeyboardInterrupt):
        pretend(prompt=(512,), generate=(16,))
    ours.run, before = good, len(log)
    rows = pretend(prompt=(512,), generate=(16,), resume=True)
    assert [row["test"] for row in rows] == ["pp512", "pp512", "tg16", "tg16"]
    assert log[before:].count("edgeformer") == 4  # tg16 alone was measured again
    assert len({row["run_id"] for row in rows}) == 1
    again = len(log)
    pretend(prompt=(512,), generate=(16,), resume=True)  # the finished run is forgotten
    assert log[again:].count("edgeformer") == 8


def test_another_run_is_not_resumed(pretend: Any, engines: dict[str, Any], log: list[str]):
    engines["edgeformer"].fails["tg16"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        pretend(prompt=(512,), generate=(16,))
    engines["edgeformer"].fails.clear()
    before = len(log)
    pretend(prompt=(512,), generate=(16,), repeats=4, resume=True)
    assert log[before:].count("edgeformer") == 10


def test_drift_is_told_and_strict_refuses(pretend: Any, probe_speeds: list[float]):
    probe_speeds[:] = [100.0, 100.0, 80.0, 100.0]
    rows = pretend(prompt=(0,), generate=(16,))
    check = rows[0]["device_check"]
    assert check["warnings"] == ["the fixed compute probe drifted by 20%: the machine's own speed changed"]
    assert [probe["compute"] for probe in check["probes"]] == [100.0, 100.0, 80.0]
    assert "drifted" in render(rows, "md")
    probe_speeds[:] = [100.0, 80.0, 100.0]
    with pytest.raises(MeasurementError, match="--strict: .*drifted by 20%"):
        pretend(prompt=(0,), generate=(16,), strict=True)
    # What was measured is kept: without --strict the rows come at once.
    assert pretend(prompt=(0,), generate=(16,), resume=True)[0]["device_check"]["warnings"]


def test_a_speed_above_the_limit_counts_for_nothing():
    rows = [{"engine": "edgeformer", "test": "tg128", "limit_fraction": 1.03}]
    with pytest.raises(MeasurementError, match="tg128 at 103%"):
        require_plausible(rows)
    require_plausible([{"engine": "edgeformer", "test": "tg128", "limit_fraction": x} for x in (1.02, None)])


def test_names_and_combinations():
    tests = Options(prompt=(512, 64), generate=(128,), depth=(0, 4096), batch=(1, 4)).tests()
    assert [t.name for t in tests] == [
        "pp512", "pp64", "tg128", "tg128@b4", "pp512@d4096", "pp64@d4096", "tg128@d4096", "tg128@d4096@b4"
    ]  # fmt: skip
    with pytest.raises(UnsupportedError, match="nothing to measure"):
        Options(prompt=(0,), generate=()).check()


def test_fractions_of_prefill_and_batches():
    found = fractions(Test("pp", 512), 500.0, WORK, LIMITS, l3_bytes=0)
    linear = (2 * (10**9 * 512 + 10**8)) / 2e12
    attention = 4 * 10 * 1000 * 512 * 513 / 2 / 1e11
    assert found.limit == pytest.approx(linear / (512 / 500))
    assert found.with_attention == pytest.approx((linear + attention) / (512 / 500))
    four = fractions(Test("tg", 99, 950, 4), 160.0, WORK, LIMITS, l3_bytes=0)
    assert four.limit == pytest.approx(40 * (10**9 + 4 * 1000 * 1000) / 5e10)


def test_a_matrix_unit_raises_the_limit_of_prefill_only():
    test, seconds = Test("pp", 512), 512 / 500
    linear, attention = WORK.linear_operations(test), WORK.attention_operations(test)
    fast = dataclasses.replace(LIMITS, matrix_peak=8e12)
    found = fractions(test, 500.0, WORK, fast, l3_bytes=0)
    assert found.limit == pytest.approx(linear / 8e12 / seconds)
    assert found.with_attention == pytest.approx((linear + attention) / 8e12 / seconds)
    assert "bf16 matrix peak" in found.why
    # A unit between the two: slower than int8 dot products, faster than fp32 vectors.
    found = fractions(test, 500.0, WORK, dataclasses.replace(LIMITS, matrix_peak=1e12), l3_bytes=0)
    assert found.limit == pytest.approx(linear / 2e12 / seconds)
    assert found.with_attention == pytest.approx((linear / 2e12 + attention / 1e12) / seconds)
    assert "int8 dot peak" in found.why
    without = fractions(test, 500.0, WORK, LIMITS, l3_bytes=0)
    assert without == fractions(test, 500.0, WORK, dataclasses.replace(LIMITS, matrix_peak=None), 0)
    assert "int8 dot peak" in without.why
    decode = Test("tg", 99, 950, 4)
    assert fractions(decode, 160.0, WORK, fast, 0) == fractions(decode, 160.0, WORK, LIMITS, 0)


def test_no_limit_is_claimed_where_none_is_known():
    unknown = Limits(threads=2, read_bandwidth=5e10, int8_peak=None, float_peak=None)
    assert fractions(Test("pp", 512), 500.0, WORK, unknown, l3_bytes=0).limit is None
    cached = fractions(Test("tg", 16), 500.0, WORK, LIMITS, l3_bytes=2 * 10**9)
    assert cached.limit is None
    assert "cache" in cached.why


def test_limits_keep_the_best_of_every_round():
    first = Limits(2, 4e10, None, 1.0, 7.0, probes={"torch_sum": 4e10})
    second = Limits(2, 3e10, 5.0, None, 9.0, probes={"torch_sum": 3e10, "int8_dot_peak": 5.0})
    best = first.best(second)
    assert best.matrix_peak == second.best(first).matrix_peak == 9.0
    none = dataclasses.replace(first, matrix_peak=None)
    assert none.best(second).matrix_peak == 9.0 and none.best(none).matrix_peak is None
    assert (best.read_bandwidth, best.int8_peak, best.float_peak, best.rounds) == (4e10, 5.0, 1.0, 2)
    assert best.probes == {"torch_sum": 4e10, "int8_dot_peak": 5.0}


def test_probes_run():
    limits = probes.measure_limits(threads=1, probe_bytes=1 << 20, repeats=1)
    assert limits.read_bandwidth > 0
    assert {"torch_sum", "copy_twice"} <= limits.probes.keys()
    assert limits.matrix_peak == limits.probes.get("matrix_peak")
    if "read_bandwidth" in limits.probes:  # the compiled probes were built
        assert (limits.matrix_peak is not None) == (detect().isa in MATRIX)


@pytest.mark.skipif("avx2" not in detect().features, reason="needs AVX2")
def test_limits_are_those_of_the_target_not_of_the_host():
    limits = probes.measure_limits(threads=1, probe_bytes=1 << 20, repeats=1, target="x86-64-v3")
    assert limits.matrix_peak is None
    assert dispatch.current_target() == detect()


@pytest.mark.parametrize(
    ("info", "features", "missing"),
    [
        ("CPU : SSE3 = 1 | AVX = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 |", {"avx", "avx2", "f16c", "fma"}, []),
        ("CPU : SSE3 = 1 | AVX = 1 |", {"avx", "avx2", "fma"}, ["AVX2", "FMA"]),
        ("CPU : AVX = 1 | AVX2 = 1 | AVX512 = 0 |", {"avx", "avx2", "avx512f"}, ["AVX512"]),
        ("CPU : AVX2 = 1 | AVX512 = 1 |", {"avx2", "avx512f", "avx512_vnni", "avx_vnni"}, ["AVX512_VNNI"]),
        ("CPU : AVX2 = 1 |", {"avx2", "avx_vnni"}, ["AVX_VNNI"]),
        ("CPU : NEON = 1 |", {"asimd", "asimddp"}, ["DOTPROD"]),
    ],
)
def test_a_build_without_this_cpus_instructions_is_seen(info: str, features: set[str], missing: list[str]):
    assert missing_isa(info, features) == missing


@pytest.mark.parametrize(
    ("target", "info", "missing", "flag"),
    [
        ("x86-64-v3", "CPU : AVX = 1 | F16C = 1 | FMA = 1 |", "AVX2 of x86-64-v3", "-DGGML_AVX_VNNI=OFF"),
        ("alderlake", "CPU : AVX = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 |", "AVX_VNNI of", "-DGGML_AVX_VNNI=ON"),
        ("x86-64-v3", "CPU : AVX = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 |", "", ""),
    ],
)
def test_a_build_is_compared_with_the_target_not_the_host(target: str, info: str, missing: str, flag: str):
    engine = LlamaCppEngine.__new__(LlamaCppEngine)
    engine.target, engine.about = target, {"system_info": info}
    engine._child = None
    if not missing:
        engine.accept()
        return
    text = f"{missing}.*GGML_NATIVE=OFF.*-DGGML_AVX2=ON.*AVX512=OFF"
    with pytest.raises(UnsupportedError, match=text) as told:
        engine.accept()
    assert flag in str(told.value)


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="pip install .*llama-cpp-python"):
        LlamaCppEngine(Path("m.gguf"), Shape(2, 128))


@pytest.mark.real
def test_work_of_the_small_model(smollm2: Path):
    work = work_of_file(smollm2, kv_element_bytes=2)
    layer = 576 * (15 * 64 + 9 * 64 + 3 * 1536)
    assert work.linear_weights == 30 * layer
    assert work.head_weights == 49152 * 576
    assert work.kv_bytes == 30 * 2 * 3 * 64 * 2
    assert 0.95 * smollm2.stat().st_size < work.weight_bytes < smollm2.stat().st_size
