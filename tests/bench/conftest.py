"""Engines that only pretend, and a bench that runs on them: no test of it depends on time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeformer.bench import fleet as bench_fleet
from edgeformer.bench import model as bench_model
from edgeformer.bench import turns as bench_turns
from edgeformer.bench.check import Load
from edgeformer.bench.child import EngineError, Timing
from edgeformer.bench.options import Options
from edgeformer.bench.peers import registry
from edgeformer.bench.probes import Limits
from edgeformer.bench.work import Test, Work
from edgeformer.compiler.errors import UnsupportedError

WORK = Work(
    weight_bytes=10**9,
    kv_bytes=1000,
    linear_weights=10**9,
    head_weights=10**8,
    num_layers=10,
    attention_width=1000,
)
LIMITS = Limits(threads=2, read_bandwidth=5e10, int8_peak=2e12, float_peak=1e11)
VOCABULARY = 11


class Pretender:
    """An engine whose every run takes as long as it was told."""

    def __init__(self, name: str, seconds: list[float], log: list[str]) -> None:
        self.name, self._seconds, self._log, self._runs = name, seconds, log, 0
        self.alive, self.opened, self.closed = True, 0, 0
        self.fails: dict[str, EngineError] = {}
        self.peak_memory = 10**8
        self.energy_source = "no counter here"
        self.processes: list[int] = []

    def open(self) -> None:
        self.opened += 1
        self.alive = True

    def prepare(self, test: Test) -> dict[str, Any]:
        self._log.append(f"warm {self.name}")
        return {"flash_attention": True}

    def run(self, test: Test) -> Timing:
        self._log.append(self.name)
        if test.name in self.fails:
            self.alive = False
            raise self.fails[test.name]
        self._runs += 1
        return Timing(self._seconds[(self._runs - 1) % len(self._seconds)], joules=None)

    def query(self, prompt: int, generate: int, batch: int = 1) -> tuple[float, float]:
        self._log.append(f"query {self.name} {prompt} {generate} {batch}")
        return 0.5, 0.5 + 0.1 * (generate - 1) * batch

    def logits(self, ids: list[int], out: Path) -> None:
        np.save(out, np.eye(VOCABULARY, dtype=np.float32)[np.array(ids) % VOCABULARY])

    def reference(self, windows: list[list[int]], out: Path) -> None:
        for i, window in enumerate(windows):
            self.logits(window, out / f"reference-{i}.npy")

    def tokens(self, text: str, count: int) -> list[int]:
        return [ord(c) % VOCABULARY for c in text[:count]]

    def layers(self) -> list[dict[str, Any]]:
        return [{"layer": "a", "record": "default"}, {"layer": "b", "record": "default"}]

    def work(self) -> Work:
        return WORK

    def describe(self) -> dict[str, Any]:
        return {"version": "1"}

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def engines(log: list[str]) -> dict[str, Any]:
    """What opens for a name: an engine, or the error that opening it raises."""
    return {
        "edgeformer": Pretender("edgeformer", [4.0, 2.0, 3.0], log),
        "llama.cpp": Pretender("llama.cpp", [8.0, 8.0, 6.0], log),
        "openvino": UnsupportedError("the peer openvino is not installed: pip install openvino-genai"),
    }


@pytest.fixture
def probe_speeds() -> list[float]:
    """What the fixed probe will tell, one after another; the last one stays."""
    return [100.0]


@pytest.fixture
def pair_speeds() -> list[float]:
    """What the probes between turns will tell, in hundredths of LIMITS."""
    return [100.0]


@pytest.fixture
def tiles() -> dict[str, float]:
    """What the probes between turns tell of a matrix unit; without it: nothing."""
    return {}


@pytest.fixture
def other_work() -> list[float]:
    """How many cores others will keep busy during each pair; none afterwards."""
    return []


def following(speeds: list[float]) -> float:
    """Return the next speed; the last one stays."""
    return speeds.pop(0) if len(speeds) > 1 else speeds[0]


@pytest.fixture
def pretend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: list[str], engines: dict[str, Any],
    probe_speeds: list[float], pair_speeds: list[float], tiles: dict[str, float], other_work: list[float],
) -> Callable[..., list[dict[str, Any]]]:  # fmt: skip
    """Run the bench on pretenders and return its rows."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"0" * 1000)

    def loads() -> Iterator[tuple[float, float]]:
        """A second passes between two readings; before every second one others worked as they were told."""
        wall = busy = 0.0
        while True:
            yield wall, busy
            wall, busy = wall + 1, busy + (other_work.pop(0) if other_work else 0.0)
            yield wall, busy

    clock = loads()

    def limits(threads: int, target: str = "auto") -> Limits:
        log.append("limits")
        return LIMITS

    def probe(threads: int) -> dict[str, float]:
        return {"compute": following(probe_speeds), "memory": 50.0}

    def turn_limits(threads: int, target: str) -> dict[str, float]:
        part = following(pair_speeds) / 100
        return {"memory": part * LIMITS.read_bandwidth, "int8": part * 2e12} | tiles

    def open_engine(name: str, *_: Any) -> Any:
        found = engines[name]
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setenv("EDGEFORMER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(bench_fleet, "open_engine", open_engine)
    monkeypatch.setattr(bench_model, "measure_limits", limits)
    monkeypatch.setattr(bench_model, "fixed_probe", probe)
    monkeypatch.setattr(bench_model, "turn_limits", turn_limits)
    monkeypatch.setattr(bench_model, "read_load", lambda *_: Load(*next(clock), 0.0, 0.0))
    monkeypatch.setattr(bench_model, "PAUSE", 0.0)
    monkeypatch.setattr(bench_turns, "PAUSE", 0.0)
    monkeypatch.setattr(bench_model, "REST", 0.0)
    monkeypatch.setitem(registry.PEERS, "openvino", ("openvino", "OpenVinoEngine"))
    monkeypatch.setattr("edgeformer.bench.check.IDLE_WINDOW", 0.0)
    monkeypatch.setattr("edgeformer.bench.check.BUSY_CORES", 1e9)
    monkeypatch.setattr("edgeformer.bench.check.STOLEN", 1e9)

    def run(**options: Any) -> list[dict[str, Any]]:
        settings = {
            "threads": (2,),
            "repeats": 3,
            "peers": ("llama.cpp",),
            "ttft": False,
            "quality_tokens": 0,
        }
        return bench_model.bench(path, Options(**(settings | options)))

    return run
