"""The device check: load, drift, throttling, samples; with a fake probe, and once on the real machine."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgeformer.bench import check as device_check
from edgeformer.bench.check import DeviceCheck, Load, read_load, sample_warnings, throttles
from edgeformer.compiler.target import available_cores, detect


def loads(monkeypatch: pytest.MonkeyPatch, *found: Load) -> None:
    answers = list(found)
    monkeypatch.setattr(device_check, "read_load", lambda *_: answers.pop(0))
    monkeypatch.setattr(device_check, "IDLE_WINDOW", 0.0)


def steady() -> dict[str, float]:
    return {"compute": 100.0, "memory": 50.0}


def test_a_quiet_machine_passes(monkeypatch: pytest.MonkeyPatch):
    loads(monkeypatch, Load(0, 0, 0, 0), Load(1, 0.05, 0, 0), Load(1, 0.05, 0, 0), Load(11, 20.0, 0, 19.9))
    monkeypatch.setattr(device_check, "governor", lambda: "performance")
    check = DeviceCheck(2, 2, steady)
    assert check.before() == []
    check.again()
    assert check.after() == []
    assert check.row()["others_during"] == pytest.approx(0.005, abs=0.001)
    assert len(check.row()["probes"]) == 3


def test_load_before_and_during_the_run_and_stolen_time(monkeypatch: pytest.MonkeyPatch):
    loads(
        monkeypatch, Load(0, 0, 0, 0), Load(1, 1.5, 0, 0.1), Load(1, 1.5, 0, 0.1), Load(11, 21.5, 1.0, 10.1)
    )
    monkeypatch.setattr(device_check, "governor", lambda: "powersave")
    check = DeviceCheck(4, 2, steady)
    assert check.before() == [
        "other programs keep 1.40 cores busy before the run",
        "the frequency governor is powersave, not performance",
        "4 threads share 2 cores",
    ]
    found = check.after()
    assert "other programs kept 1.00 cores busy during the run" in found
    assert "the hypervisor took 5% of the cores' time" in found


def test_drift_of_the_probe(monkeypatch: pytest.MonkeyPatch):
    loads(monkeypatch, *[Load(i, 0, 0, 0) for i in range(4)])
    speeds = iter([100.0, 97.0, 90.0])
    check = DeviceCheck(2, 2, lambda: {"compute": next(speeds)})
    check.before()
    check.again()
    assert check.after() == ["the fixed compute probe drifted by 10%: the machine's own speed changed"]
    assert check.row()["compute_drift"] == 0.1


def test_throttling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    counter = tmp_path / "cpu0" / "thermal_throttle" / "core_throttle_count"
    assert throttles(tmp_path) is None
    counter.parent.mkdir(parents=True)
    counter.write_text("3\n")
    loads(monkeypatch, *[Load(i, 0, 0, 0) for i in range(4)])
    monkeypatch.setattr(device_check, "throttles", lambda: throttles(tmp_path))
    check = DeviceCheck(2, 2, steady)
    check.before()
    counter.write_text("5\n")
    assert check.after() == ["cores were throttled for heat 2 times"]


def test_samples_that_say_little():
    assert sample_warnings([100.0, 101.0, 99.0]) == []
    assert sample_warnings([100.0, 130.0]) == [
        "only 2 repeats: no spread worth the name", "repeats differ by ±13%"
    ]  # fmt: skip


@pytest.mark.real
def test_a_real_background_load_is_seen(monkeypatch: pytest.MonkeyPatch):
    """Busy processes on every core are told, both at rest and over a run."""
    burn = [sys.executable, "-c", "while True: pass"]
    others: list[Any] = [subprocess.Popen(burn) for _ in range(available_cores())]
    try:
        check = DeviceCheck(1, available_cores(), steady)
        assert any("cores busy before the run" in text for text in check.before())
        subprocess.run([sys.executable, "-c", "import time; time.sleep(0.5)"], check=True)
        assert any("cores busy during the run" in text for text in check.after())
    finally:
        for process in others:
            process.kill()
            process.wait()


@pytest.mark.real
def test_our_own_engines_are_no_load():
    burn = [sys.executable, "-c", "sum(i for i in range(30_000_000))"]
    engine = subprocess.Popen(burn)
    deadline = time.monotonic() + 60
    while engine.poll() is None and time.monotonic() < deadline:
        if read_load([engine.pid]).own > read_load().own + 0.05:
            break
    else:
        pytest.fail("the engine's time does not count as ours")
    engine.kill()
    engine.wait()


@pytest.mark.real
def test_the_fixed_probe_runs():
    found = device_check.fixed_probe(1, repeats=1)
    assert found["compute"] > 0 and found["memory"] > 0


@pytest.mark.skipif(detect().arch != "x86_64", reason="the other target is an x86")
def test_limits_between_turns_are_the_targets(monkeypatch: pytest.MonkeyPatch):
    """A bench of another instruction set has that one's peaks beside each turn, not the host's."""
    from edgeformer.runtime import dispatch, probes

    seen: list[str] = []
    given = probes.rounds
    monkeypatch.setattr(
        probes, "rounds", lambda *of: (seen.append(dispatch.current_target().isa), given(*of))[1]
    )
    monkeypatch.setattr(device_check, "TURN_SECONDS", 0.0)
    found = device_check.turn_limits(1, "x86-64-v2")
    assert {"memory", "int8", "float"} <= found.keys()
    device_check.turn_limits(1)
    assert seen == ["portable", dispatch.current_target().isa]
