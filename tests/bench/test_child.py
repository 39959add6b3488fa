"""An engine's child process: what it answers, and what happens when it refuses, dies or hangs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeformer.bench.child import (
    ChildEngine,
    EngineError,
    EngineKind,
    Patience,
    Shape,
    cold_start,
    peak_memory,
)
from edgeformer.bench.peers.llama_cpp import REBUILD, LlamaCppEngine
from edgeformer.bench.work import Test
from edgeformer.compiler.errors import UnsupportedError

KIND = EngineKind("toy", "toy", "toy", "pip install toy", ("json",), ("toy",))
CHILD = """
import json, os, subprocess, sys, time
log = []
for line in sys.stdin:
    q = json.loads(line)
    log.append(q)
    if q["do"] == "load":
        answer = {"version": "0", "settings": [{"fast": False}, {"fast": True}], "fixed": {"kv": "fp16"}}
    elif q["do"] == "time":
        if q["test"]["tokens"] == 13:
            os._exit(9)
        if q["test"]["tokens"] == 15:
            print('{"seconds": 1', end="", flush=True)
            os._exit(9)
        if q["test"]["tokens"] == 14:
            if "TOY_HELPER" in os.environ:
                helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
                open(os.environ["TOY_HELPER"], "w").write(str(helper.pid))
            time.sleep(60)
        answer = {"seconds": 1.0 if q["setting"]["fast"] else 2.0, "joules": None}
    elif q["do"] == "query":
        answer = {"first": 0.1, "last": 0.2}
    else:
        answer = {"error": f"ValueError: no {q['do']}"}
    print(json.dumps(answer | {"peak_memory": 5}), flush=True)
"""


class ToyEngine(ChildEngine):
    """A child that runs CHILD."""

    def command(self) -> list[str]:
        return [sys.executable, "-c", CHILD]


def toy(**patience: float) -> ToyEngine:
    return ToyEngine(KIND, Path("m.gguf"), Shape(2, 128), Patience(**patience))


def test_the_faster_setting_is_chosen_and_used():
    engine = toy()
    assert engine.prepare(Test("pp", 4)) == {"kv": "fp16", "fast": True}
    assert engine.run(Test("pp", 4)).seconds == 1.0
    assert engine.peak_memory == 5
    assert engine.describe() == {"version": "0"}
    engine.close()
    assert not engine.alive


def test_a_death_in_the_middle_of_an_answer_is_the_peers_own():
    engine = toy()
    engine.prepare(Test("pp", 4))
    with pytest.raises(EngineError, match="toy gave half an answer"):
        engine.run(Test("pp", 15))
    assert not engine.alive


def test_a_refusal_leaves_the_child_alive():
    engine = toy()
    with pytest.raises(EngineError, match="no logits"):
        engine.logits([1], Path("out.npy"))
    assert engine.alive
    engine.close()


def test_a_dead_child_is_told_and_can_be_opened_again():
    engine = toy()
    with pytest.raises(EngineError, match="toy stopped .exit 9."):
        engine.prepare(Test("pp", 13))
    assert not engine.alive
    engine.open()
    assert engine.alive
    engine.close()


def test_a_hanging_child_is_ended():
    engine = toy(answer=0.5)
    start = time.monotonic()
    with pytest.raises(EngineError, match="no answer to 'time'") as caught:
        engine.prepare(Test("pp", 14))
    assert caught.value.status == "timeout"
    assert time.monotonic() - start < 30
    engine.close()
    assert not engine.alive


def test_what_a_hanging_child_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a compiler's workers would go on, on the cores that the others are measured on."""
    import psutil

    monkeypatch.setenv("TOY_HELPER", str(tmp_path / "pid"))
    engine = toy(answer=5.0)
    with pytest.raises(EngineError, match="no answer to 'time'"):
        engine.prepare(Test("pp", 14))
    helper = int((tmp_path / "pid").read_text())

    def runs() -> bool:
        try:
            return psutil.Process(helper).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    deadline = time.monotonic() + 10
    while runs() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs()


def test_a_cold_start_closes_its_process():
    opened = []

    def start() -> ToyEngine:
        opened.append(toy())
        return opened[0]

    seconds, peak = cold_start(start, 4)
    assert seconds > 0 and peak == 5
    assert not opened[0].alive


def test_the_peak_of_a_child_is_its_own():
    """A new process must not begin with the peak of the one that started it."""
    ballast = bytearray(300 << 20)
    for i in range(0, len(ballast), 4096):
        ballast[i] = 1
    code = "from edgeformer.bench.child import peak_memory; print(peak_memory())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(found.stdout) < 150 << 20
    assert (peak_memory() or 0) > 300 << 20
    del ballast


def test_an_unfit_build_is_refused_and_an_old_one_told(monkeypatch: pytest.MonkeyPatch):
    real, script = subprocess.Popen, ["CPU : SSE3 = 1 |"]

    def start(command: list[str], **options: Any) -> Any:
        load = json.dumps({"version": "0", "system_info": script[0], "model": "m"})
        code = f"import sys, os, signal\nsys.stdin.readline(); print({load!r}, flush=True)\n"
        code += "sys.stdin.readline(); os.kill(os.getpid(), signal.SIGILL)"
        return real([sys.executable, "-c", code], **options)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("subprocess.Popen", start)
    features = SimpleNamespace(features={"avx2"})
    monkeypatch.setattr("edgeformer.compiler.target.detect", lambda: features)
    with pytest.raises(UnsupportedError) as caught:
        LlamaCppEngine(Path("m.gguf"), Shape(2, 128))
    assert "AVX2" in str(caught.value)
    assert REBUILD in str(caught.value)
    features.features = set()
    script[0] = "CPU : AMX_INT8 = 1 |"
    engine = LlamaCppEngine(Path("m.gguf"), Shape(2, 128))
    with pytest.raises(EngineError, match="illegal instruction in its AMX kernels"):
        engine.prepare(Test("pp", 4))
    engine.close()
