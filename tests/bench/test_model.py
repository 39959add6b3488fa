"""The bench on engines that only pretend: order, rows, limits and refusals. No test depends on time."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest

from edgeformer.bench import model as bench_model
from edgeformer.bench import probes
from edgeformer.bench.model import MeasurementError, Options, bench, require_plausible
from edgeformer.bench.peers.llama_cpp import REBUILD, LlamaCppEngine, missing_isa
from edgeformer.bench.probes import Limits
from edgeformer.bench.table import render
from edgeformer.bench.work import Test, Work, fractions, work_of_file
from edgeformer.compiler.errors import EdgeFormerError, UnsupportedError
from edgeformer.compiler.target import detect
from edgeformer.kernels.shared.isa.table import MATRIX

WORK = Work(
    weight_bytes=10**9,
    kv_bytes=1000,
    linear_weights=10**9,
    head_weights=10**8,
    num_layers=10,
    attention_width=1000,
)
LIMITS = Limits(threads=2, read_bandwidth=5e10, int8_peak=2e12, float_peak=1e11)


class Pretender:
    """An engine whose every run takes as long as it was told."""

    def __init__(self, name: str, seconds: list[float], log: list[str]) -> None:
        self.name, self._seconds, self._log, self._runs = name, seconds, log, 0
        self.closed = False

    def prepare(self, test: Test) -> dict[str, Any]:
        self._log.append(f"warm {self.name}")
        return {"flash_attention": True}

    def run(self, test: Test) -> float:
        self._log.append(self.name)
        self._runs += 1
        return self._seconds[(self._runs - 1) % len(self._seconds)]

    def work(self) -> Work:
        return WORK

    def describe(self) -> dict[str, Any]:
        return {"version": "1"}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: list[str]):
    """Run the bench on pretenders and return its rows."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"0" * 1000)
    engines = [Pretender("edgeformer", [4.0, 2.0, 3.0], log), Pretender("llama.cpp", [8.0, 8.0, 6.0], log)]

    def limits(threads: int) -> Limits:
        log.append("limits")
        return LIMITS

    monkeypatch.setattr(bench_model, "open_engines", lambda *_: engines)
    monkeypatch.setattr(bench_model, "measure_limits", limits)
    monkeypatch.setattr(bench_model, "PAUSE", 0.0)

    def run(**options: Any) -> list[dict[str, Any]]:
        rows = bench(path, Options(threads=(2,), repeats=3, **options))
        assert all(engine.closed for engine in engines)
        return rows

    return run


def test_engines_take_turns_and_limits_are_measured_around(pretend: Any, log: list[str]):
    pretend(prompt=(0,), generate=(16,))
    assert log == [
        "limits", "warm edgeformer", "warm llama.cpp", "edgeformer", "llama.cpp", "llama.cpp", "edgeformer",
        "edgeformer", "llama.cpp", "limits",
    ]  # fmt: skip


def test_rows_have_the_median_the_spread_and_where_they_come_from(pretend: Any):
    rows = pretend(prompt=(512,), generate=(120,))
    assert [(r["engine"], r["test"]) for r in rows] == [
        ("edgeformer", "pp512"), ("llama.cpp", "pp512"), ("edgeformer", "tg120"), ("llama.cpp", "tg120")
    ]  # fmt: skip
    ours = rows[2]
    assert ours["tokens_per_second"] == 40.0
    assert ours["spread"] == pytest.approx(15.0)
    assert sorted(ours["samples"]) == [30.0, 40.0, 60.0]
    bytes_a_step = 10**9 + 1000 * 60.5
    assert ours["limit_fraction"] == pytest.approx(40 * bytes_a_step / 5e10, rel=1e-3)
    assert ours["limits"]["rounds"] == 3
    assert ours["limits"]["matrix_peak"] is None
    needed = {"schema_version", "run_id", "model", "size", "threads", "versions", "device", "options"}
    assert needed <= ours.keys()
    assert len({r["run_id"] for r in rows}) == 1


def test_tables(pretend: Any):
    rows = pretend(prompt=(), generate=(120,))
    assert json.loads(render(rows, "json")) == rows
    table = render(rows, "md").splitlines()
    assert "| 2.00 |" in table[0].replace("x llama.cpp", "2.00")
    assert "| edgeformer | 2 | tg120 | 40.0 ± 15.0 |" in table[2]
    parsed = list(csv.DictReader(io.StringIO(render(rows, "csv"))))
    assert [row["test"] for row in parsed] == ["tg120", "tg120"]
    assert json.loads(parsed[0]["limits"])["read_bandwidth"] == 5e10


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
        Options(prompt=(0,), generate=()).tests()


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


def test_a_missing_peer_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="pip install .*llama-cpp-python"):
        LlamaCppEngine(Path("m.gguf"), 2, 128)


CHILD = """
import json, sys
for line in sys.stdin:
    question = json.loads(line)
    if question["do"] == "load":
        print(json.dumps({"version": "0", "system_info": "CPU : SSE3 = 1 |", "model": "m"}), flush=True)
    else:
        print(json.dumps({"error": "ValueError: no such test"}), flush=True)
"""


def test_an_unfit_build_and_a_dying_child_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import subprocess
    import sys
    from types import SimpleNamespace

    real = subprocess.Popen
    script = [CHILD]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(
        "subprocess.Popen", lambda command, **options: real([sys.executable, "-c", script[0]], **options)
    )
    features = SimpleNamespace(features={"avx2"})
    monkeypatch.setattr("edgeformer.compiler.target.detect", lambda: features)
    with pytest.raises(UnsupportedError) as caught:
        LlamaCppEngine(Path("m.gguf"), 2, 128)
    assert "AVX2" in str(caught.value)
    assert REBUILD in str(caught.value)
    features.features = set()
    engine = LlamaCppEngine(Path("m.gguf"), 2, 128)
    with pytest.raises(EdgeFormerError, match="no such test"):
        engine.prepare(Test("pp", 4))
    engine.close()
    script[0] = "import sys; sys.exit('out of memory')"
    with pytest.raises(EdgeFormerError, match=r"llama\.cpp stopped .*out of memory"):
        LlamaCppEngine(Path("m.gguf"), 2, 128)


@pytest.mark.real
def test_work_of_the_small_model(smollm2: Path):
    work = work_of_file(smollm2, kv_element_bytes=2)
    layer = 576 * (15 * 64 + 9 * 64 + 3 * 1536)
    assert work.linear_weights == 30 * layer
    assert work.head_weights == 49152 * 576
    assert work.kv_bytes == 30 * 2 * 3 * 64 * 2
    assert 0.95 * smollm2.stat().st_size < work.weight_bytes < smollm2.stat().st_size
