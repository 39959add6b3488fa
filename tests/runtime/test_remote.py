"""Tuning on devices that are loopback servers: spread, lost, silent, and gone with their owner."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgeformer.cli import app
from edgeformer.compiler.errors import UnsupportedError
from edgeformer.compiler.journal import Journal, Trial
from edgeformer.compiler.measure import Measured, Sample
from edgeformer.compiler.records import RecordStore
from edgeformer.compiler.target import detect
from edgeformer.compiler.tuner import Problem, tune
from edgeformer.kernels.quant_matmul import OPERATOR, QuantMatmulSpec, WeightFormat
from edgeformer.runtime.remote import (
    DeviceLost,
    NoDevice,
    Place,
    RemoteEvaluator,
    parse_address,
    places,
    read_answer,
)
from edgeformer.runtime.tuning import problem_of, versions

from ..model.conftest import write_gguf
from .null_tuning import Null, null_operators

pytest.importorskip("tornado", reason="TVM's tracker needs tornado")
pytestmark = pytest.mark.real


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child processes of this one import the null operator by its module's name."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])


def null_problem() -> Problem:
    found = problem_of(null_operators()["null"], Null(), {"m": 1}, detect(), 1)
    assert found is not None
    provider = "null_tuning:null_operators"
    return dataclasses.replace(found, request=dataclasses.replace(found.request, provider=provider))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], int]]]:
    """A function that starts a device, with a cache folder of its own; all end with the test."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str, ready: str = "listening on") -> tuple[subprocess.Popen[str], int]:
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        cache = str(tmp_path / f"device{len(started)}")
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"EDGEFORMER_CACHE_DIR": cache, "PYTHONPATH": path},
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline() if ready else ""
        assert line.startswith(ready), process.stderr and process.stderr.read()
        return process, int(line.rpartition(":")[2] or 0) if ready else 0

    yield run
    for process in started:
        for pid in _family(process.pid):  # a tracker's worker would outlive it
            with contextlib.suppress(ProcessLookupError):  # a session's child may end meanwhile
                os.kill(pid, signal.SIGKILL)
        process.wait()


def serve(start: Any, *more: str) -> tuple[subprocess.Popen[str], int]:
    return start("edgeformer.cli", "device", "serve", "--port", "0", *more)


def run_null(
    where: list[Place], folder: Path, trials: int, trial_seconds: float = 20.0, then: Any = lambda: None
) -> tuple[Any, float]:
    """Return (outcome, seconds of the search) of a null problem; each device is awake before."""
    journal, records = Journal(folder), RecordStore(folder, shipped=folder / "none")
    with RemoteEvaluator(where, trial_seconds, 30.0) as devices:
        given = null_problem()
        held = [devices._take() for _ in where]
        for device in held:
            devices._give(device)
        for device in held:  # torch is imported there, the problem is prepared
            request = dataclasses.replace(given.request, configurations=(given.space.default,))
            device.ask(request, 60.0)
            device.known.add(request.problem)
        for number in range(devices.width):  # the builders here are awake too
            devices._library(given.request, {"number": 39 - number})
        then()
        start = time.monotonic()
        (outcome,) = tune(
            [given], devices, records, journal, seconds=120.0, versions=versions(), most_trials=trials
        )
        took = time.monotonic() - start
    statuses = [trial.status for trial in journal.trials(given.key)]
    assert len(statuses) == outcome.trials and set(statuses) <= {"good", "noisy"}, statuses
    journal.close()
    return outcome, took


def test_a_kernel_is_built_here_and_checked_and_timed_there(start: Any, tmp_path: Path) -> None:
    _, port = serve(start, "--key", "box")
    journal, records = Journal(tmp_path), RecordStore(tmp_path, shipped=tmp_path / "none")
    with RemoteEvaluator([Place("127.0.0.1", port, "box")]) as devices:
        target = devices.target()
        assert target.key() == detect().key() and target.features == detect().features
        spec = QuantMatmulSpec(64, 64, WeightFormat.int4(), "int8")
        given = problem_of(OPERATOR, spec, {"m": 1}, dataclasses.replace(target, l3=0), 1)
        assert given is not None
        (outcome,) = tune(
            [given], devices, records, journal, seconds=60.0, versions=versions(), most_trials=2
        )
    assert outcome.state == "tuned" and outcome.trials == 2 and outcome.record is not None
    assert {t.status for t in journal.trials(given.key)} <= {"good", "noisy", "pruned"}


def tracker_with(start: Any, devices: int, key: str) -> tuple[str, list[Place]]:
    """Start a tracker and devices that report to it; return its address and the devices' places."""
    port = free_port()
    start(
        "tvm.exec.rpc_tracker",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--port-end",
        str(port + 1),
        ready="",
    )
    tracker = f"127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            time.sleep(0.2)
    for _ in range(devices):
        serve(start, "--tracker", tracker, "--key", key)
    where: list[Place] = []
    while len(where) < devices and time.monotonic() < deadline:
        try:
            where = places([], tracker, key)
        except NoDevice:
            time.sleep(0.5)
    return tracker, where


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function that runs `edgeformer tune` in this process, with a cache folder of its own."""
    monkeypatch.setenv("EDGEFORMER_CACHE_DIR", str(tmp_path / "here"))
    monkeypatch.setattr("edgeformer.compiler.tuner.PATIENCE", 1)  # ends a search, whatever the machine
    return lambda *arguments: CliRunner().invoke(app, ["tune", *map(str, arguments)])


def test_the_command_tunes_on_a_device_and_keeps_the_records_here(
    start: Any, command: Callable[..., Any], tmp_path: Path
) -> None:
    model = write_gguf(tmp_path / "model.gguf", "Q4_0").path
    process, port = serve(start, "--key", "box")
    place = ("--rpc", f"127.0.0.1:{port}", "--operators", "quant_matmul", "--budget", "5m", "-o", "json")
    done = command(model, *place, "--key", "box", "-t", "1")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["trials"] > 0 and {row["state"] for row in found["problems"]} == {"tuned"}
    records = RecordStore(tmp_path / "here", shipped=tmp_path / "none").all()
    assert {record.operator for record, _ in records} <= {"quant_matmul"}
    assert len(records) >= len(found["problems"])
    for more, text in (((*place, "--key", "wrong"), f"every device is lost (127.0.0.1:{port}: "),
                       (("--rpc", f"127.0.0.1:{free_port()}"), "refused"),
                       (("--rpc", "here"), "HOST:PORT")):  # fmt: skip
        refused = command(model, *more)
        assert refused.exit_code == 2 and len(refused.stderr.strip().splitlines()) == 1, refused.output
        assert text in refused.stderr
    assert process.poll() is None


@pytest.mark.slow  # places of a tracker, and the command with one device, are tested each by itself
def test_the_command_takes_every_free_device_of_a_tracker(
    start: Any, command: Callable[..., Any], tmp_path: Path
) -> None:
    model = write_gguf(tmp_path / "model.gguf", "Q4_0").path
    tracker, where = tracker_with(start, 2, "board")
    assert len(where) == 2
    options = ("--tracker", tracker, "--operators", "quant_matmul", "--budget", "5m", "-t", "1")
    done = command(model, *options, "--key", "board", "-o", "json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["trials"] > 0
    none = command(model, *options, "--key", "phone")
    assert none.exit_code == 2 and "no device of the key 'phone'" in none.stderr


def test_three_devices_of_a_tracker_share_the_trials(start: Any, tmp_path: Path) -> None:
    _, where = tracker_with(start, 3, "board")
    _, alone = serve(start)
    one, one_took = run_null([Place("127.0.0.1", alone)], tmp_path / "one", 18)
    three, three_took = run_null(where, tmp_path / "three", 18)
    assert (one.trials, three.trials) == (18, 18)
    print(f"one device {one_took:.1f} s, three {three_took:.1f} s")
    assert three_took <= 0.5 * one_took


def test_a_killed_and_a_silent_device_cost_nothing_but_time(start: Any, tmp_path: Path) -> None:
    devices = [serve(start) for _ in range(3)]
    where = [Place("127.0.0.1", port) for _, port in devices]

    import threading

    def harm() -> None:
        devices[0][0].kill()
        for pid in _family(devices[1][0].pid):
            os.kill(pid, signal.SIGSTOP)

    later = threading.Timer(1.0, harm)  # in the middle of the search
    family: list[int] = []
    try:
        outcome, _ = run_null(where, tmp_path / "three", 30, 3.0, then=later.start)
    finally:
        family = _family(devices[1][0].pid)
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    assert outcome.state == "tuned" and outcome.trials == 30


_CLOSES = """
import sys, psutil
from edgeformer.runtime.remote import Place, RemoteEvaluator
port, server = map(int, sys.argv[1:])
with RemoteEvaluator([Place("127.0.0.1", port)]) as devices:
    devices.target()
    for process in psutil.Process(server).children(recursive=True):
        process.suspend()
print("closed")
"""


def test_a_device_that_falls_silent_between_two_questions_is_left(start: Any) -> None:
    """In a process of its own: TVM waits for what a device lets go of with the interpreter's lock held."""
    process, port = serve(start)
    command = [sys.executable, "-c", _CLOSES, str(port), str(process.pid)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.stdout == "closed\n", done.stderr


def _family(pid: int) -> list[int]:
    import psutil

    try:
        process = psutil.Process(pid)
        return [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def test_processes_of_a_device_end_with_it_however_it_ends(start: Any, tmp_path: Path) -> None:
    process, port = serve(start)
    run_null([Place("127.0.0.1", port)], tmp_path / "a", 1)
    with RemoteEvaluator([Place("127.0.0.1", port)]) as devices:
        devices.target()
        family = _family(process.pid)
        assert len(family) >= 2  # the server and its session
        process.kill()
        process.wait()
        deadline = time.monotonic() + 10
        import psutil

        alive = family
        while alive and time.monotonic() < deadline:
            alive = [p for p in family if psutil.pid_exists(p) and _running(p)]
            time.sleep(0.1)
        assert alive == []


def _running(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_wrong_keys_garbage_and_nobody_are_told(start: Any, tmp_path: Path) -> None:
    process, port = serve(start, "--key", "box")
    with socket.create_connection(("127.0.0.1", port), 5) as line:
        line.sendall(b"GET / HTTP/1.1\r\n\r\n" * 4)
    with RemoteEvaluator([Place("127.0.0.1", port, "another")]) as devices, pytest.raises(NoDevice):
        devices.target()
    assert process.poll() is None
    with RemoteEvaluator([Place("127.0.0.1", port, "box")]) as devices:
        assert devices.target().key() == detect().key()  # it still serves
    with RemoteEvaluator([Place("127.0.0.1", free_port())]) as devices, pytest.raises(NoDevice):
        devices.target()
    for text in ("board", "board:", ":1", "board:0", "board:99999", "board:x"):
        with pytest.raises(UnsupportedError, match="HOST:PORT"):
            parse_address(text)


@pytest.mark.parametrize(
    "data", [b"", b"garbage", pickle.dumps(3), pickle.dumps((1, 2)), pickle.dumps(("answer", os.system))]
)
def test_answers_that_are_no_results_count_as_a_lost_device(data: bytes) -> None:
    with pytest.raises(DeviceLost, match="cannot be read"):
        read_answer(data)


def test_answers_bring_results_alone() -> None:
    trial = Trial({"a": 1}, "good", 0.5, 1.0, 0.1)
    measured = Measured((Sample(1.0, 0.1, 3),), ((1.0, 1.1),), 0.0, 1)
    for value in (trial, measured, ("text", b"bytes", 1)):
        assert read_answer(pickle.dumps(("answer", value))) == ("answer", value)


def test_a_device_says_that_rpc_is_code_execution_and_stays_on_loopback(start: Any) -> None:
    process, port = serve(start)
    process.terminate()
    assert process.stderr is not None
    said = process.stderr.read()
    assert "code execution" in said and f"ssh -L {port}:127.0.0.1:{port}" in said
    assert "other machines" not in said
