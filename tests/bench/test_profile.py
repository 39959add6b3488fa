"""The stamped program: the same results as the plain one, phases that fill the call, and their limits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from edgeformer.bench import profile as bench_profile
from edgeformer.bench.options import Options
from edgeformer.bench.probes import Limits
from edgeformer.bench.profile import Call, Phase, Profile, Stamped, cycles_a_second, table, write_trace
from edgeformer.bench.work import Test
from edgeformer.compiler.errors import FormatError
from edgeformer.compiler.target import detect

PHASES = [Phase("qkv", 0, 0.0, 1e-5), Phase("o", 0, 1e-5, 2e-5), Phase("qkv", 1, 3e-5, 1e-5)]
FOUND = Profile("tg1", PHASES, 5e-5, 4e-5, {"qkv": 1e-5})


def test_phases_and_layers_are_added():
    assert FOUND.by_name() == [("qkv", 2, pytest.approx(2e-5), 1e-5), ("o", 1, 2e-5, None)]
    assert FOUND.by_layer() == {0: pytest.approx(3e-5), 1: 1e-5}
    text = table([FOUND])
    assert "| qkv | 2 | 20.0 | 40.0% | 10.0 | 50% | 10.0 |" in text
    assert "| o | 1 | 20.0 | 40.0% |  |  |  |" in text
    assert "50 µs with stamps, 40 µs without" in text


def test_the_trace_is_chromes(tmp_path: Path):
    write_trace([FOUND], tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [e["name"] for e in events] == ["process_name", "qkv (0)", "o (0)", "qkv (1)"]
    assert events[2] | {"ts": 10.0, "dur": 20.0, "ph": "X", "pid": 0, "tid": 0} == events[2]
    with pytest.raises(FormatError, match="cannot write"):
        write_trace([FOUND], tmp_path / "no" / "trace.json")


def test_the_counters_rate():
    calls = [Call("step_1", 1.0, 0.1, [[0, 1000]]), Call("step_1", 3.0, 0.1, [[0, 5000]])]
    assert cycles_a_second(calls) == 2000.0


@pytest.mark.real
@pytest.mark.skipif(detect().arch != "x86_64", reason="reads the cycle counter of x86-64")
def test_the_stamped_program_computes_the_same(smollm2: Path, monkeypatch: pytest.MonkeyPatch):
    from edgeformer.model.loading import load

    model = load(smollm2, context=64)
    prompt = torch.arange(5, 25)
    plain = [model.prefill(prompt), *(model.decode(7) for _ in range(2))]
    model.reset()
    stamped = Stamped(model)
    with stamped:
        found = [model.prefill(prompt)]
        prefill = stamped.last
        found += [model.decode(7) for _ in range(2)]
        step = stamped.last
    model.decode(7)
    assert stamped.last is step  # the plain program is back
    for a, b in zip(plain, found, strict=True):
        torch.testing.assert_close(a, b)
    layers = model.config.num_layers
    for call, one_each in ((prefill, "rope, KV append"), (step, "o")):
        phases = stamped.phases(call, rate=1e9, behind="rest")
        names = [phase.name for phase in phases]
        assert {"qkv", "attention", "o", "gate_up", "down"} <= set(names)
        assert names.count(one_each) == layers
        assert {phase.layer for phase in phases} == {-1, *range(layers)}
        starts = [phase.start for phase in phases]
        assert starts == sorted(starts) and min(phase.seconds for phase in phases) >= 0
    monkeypatch.setattr(bench_profile, "REPEATS", 3)
    limits = Limits(model.threads, 3e10, 1e12, 2e11)
    monkeypatch.setattr(bench_profile, "measure_limits", lambda threads: limits)
    tests = [Test("pp", 20), Test("tg", 1, 10)]
    for made in bench_profile.profile(smollm2, tests, Options()):
        assert made.seconds > 0 and made.plain_seconds > 0
        assert 0.9 < sum(phase.seconds for phase in made.phases) / made.seconds <= 1.02
        assert {"qkv", "attention", "o"} <= made.limits.keys()
