"""Engines run in processes of their own: a crash or a hang of one costs its row, not the run.

A child (`python -m MODULE FILE`) answers one JSON line for each line it reads; whatever its libraries print
goes to stderr. So thread pools never compete inside one process, and its peak memory is its own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from ..compiler.errors import EdgeFormerError, UnsupportedError
from .energy import Clock, Meter
from .work import Test, Work

TRIALS, TRIAL_SECONDS = 2, 6.0  # rounds behind the warm-up to find the best setting; at most so long
CLEARLY = 0.98  # of the time of an earlier setting: a tie goes to the earlier one, in every run


class EngineError(EdgeFormerError):
    """An engine crashed, hung or refused; `status` is "failed" or "timeout"."""

    def __init__(self, text: str, status: str = "failed") -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Shape:
    """What an engine has to hold: threads, tokens of one sequence, sequences side by side."""

    threads: int
    context: int
    batch: int = 1


@dataclass(frozen=True)
class Timing:
    """Seconds of the timed part, and joules where there is a counter."""

    seconds: float
    joules: float | None = None


@dataclass(frozen=True)
class Patience:
    """Seconds that a child may take; a longer silence counts as a hang."""

    load: float = 300.0
    answer: float = 180.0


@dataclass(frozen=True)
class EngineKind:
    """How an engine is started, what it needs, and the command that installs it."""

    name: str
    module: str
    package: str
    install: str
    imports: tuple[str, ...]
    packages: tuple[str, ...]

    def missing(self) -> str:
        """Return what to do where a package is missing, or ""."""
        if all(importlib.util.find_spec(name) is not None for name in self.imports):
            return ""
        return f"the peer {self.name} is not installed: {self.install}"


class Runner(Protocol):
    """An engine inside its child process."""

    def load(self, threads: int, context: int, batch: int, **options: Any) -> dict[str, Any]:
        """Hold the model. Return `version`, `settings` (those to choose from), and what else tells."""
        ...

    def time(self, test: Test, setting: Any, clock: Clock) -> None:
        """Run a test from an empty cache, its timed part inside `with clock`."""
        ...

    def query(self, prompt: int, generate: int, batch: int, setting: Any) -> tuple[float, float]:
        """Answer `batch` prompts at once; return the seconds to the first tokens, and to the last."""
        ...

    def logits(self, ids: Sequence[int], out: Path, setting: Any) -> None:
        """Write fp32 logits [tokens, vocabulary] of one sequence to an .npy file."""
        ...


class ChildEngine:
    """The parent's side of an engine. `run`, `query`, `logits` raise EngineError; then it may be reopened."""

    def __init__(
        self, kind: EngineKind, path: Path, shape: Shape, patience: Patience | None = None, **options: Any
    ) -> None:
        if problem := kind.missing():
            raise UnsupportedError(problem)
        self.kind, self.name = kind, kind.name
        self.path, self.shape, self.options = path, shape, options
        self.patience = patience or Patience()
        self.about: dict[str, Any] = {}
        self.peak_memory: int | None = None
        self._chosen: dict[tuple[str, int, int, int], Any] = {}
        self._child: subprocess.Popen[str] | None = None
        self.open()

    def open(self) -> None:
        """Start the child and load the model."""
        self.close()
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed in close()
        self._child = subprocess.Popen(
            self.command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env=self.environment(),
        )  # fmt: skip
        assert self._child.stdout is not None
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_pump, args=(self._child.stdout, self._lines), daemon=True).start()
        try:
            self.about = self.ask({"do": "load", **vars(self.shape), **self.options}, self.patience.load)
            self.accept()
        except BaseException:
            self.close()
            raise

    def command(self) -> list[str]:
        """Return the command line of the child."""
        return [sys.executable, "-P", "-m", self.kind.module, str(self.path)]

    def environment(self) -> dict[str, str]:
        """Return the child's environment: this one without settings of OpenMP, plus its thread count."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "MKL_", "KMP_"))}
        return kept | {"OMP_NUM_THREADS": str(self.shape.threads)}

    def accept(self) -> None:
        """Refuse a build that would make the comparison unfair."""

    @property
    def alive(self) -> bool:
        """Whether the child runs."""
        return self._child is not None and self._child.poll() is None

    @property
    def processes(self) -> list[int]:
        """The child's process id, where it runs."""
        return [self._child.pid] if self._child is not None and self.alive else []

    @property
    def energy_source(self) -> str:
        """What measures this engine's energy, or why nothing does."""
        return str(self.about.get("energy_source", "the engine does not tell"))

    def prepare(self, test: Test) -> dict[str, Any]:
        """Warm up, and choose this test's best setting where there are several; return it."""
        settings = self.about.get("settings") or [{}]
        best = [self._time(test, setting).seconds for setting in settings]
        start, trials = time.monotonic(), TRIALS if len(settings) > 1 else 0
        while trials and time.monotonic() - start < TRIAL_SECONDS:
            best = [
                min(s, self._time(test, setting).seconds) for s, setting in zip(best, settings, strict=True)
            ]
            trials -= 1
        chosen = 0
        for i, seconds in enumerate(best):
            chosen = i if seconds < CLEARLY * best[chosen] else chosen
        self._chosen[test.kind, test.tokens, test.depth, test.batch] = settings[chosen]
        return {**self.about.get("fixed", {}), **settings[chosen]}

    def run(self, test: Test, setting: Any = None) -> Timing:
        """Run a test from an empty cache, with the setting that was chosen for it unless another is given."""
        chosen = self._chosen.get((test.kind, test.tokens, test.depth, test.batch))
        return self._time(test, setting or chosen)

    def _time(self, test: Test, setting: Any) -> Timing:
        answer = self.ask({"do": "time", "test": vars(test), "setting": setting})
        return Timing(answer["seconds"], answer.get("joules"))

    def query(self, prompt: int, generate: int, batch: int = 1) -> tuple[float, float]:
        """Answer `batch` random prompts at once: seconds to the first tokens, and to the last."""
        ask = {"do": "query", "prompt": prompt, "generate": generate, "batch": batch}
        answer = self.ask(ask | {"setting": self._setting("pp")})
        return answer["first"], answer["last"]

    def logits(self, ids: Sequence[int], out: Path) -> None:
        """Write fp32 logits [tokens, vocabulary] of one sequence to an .npy file."""
        self.ask({"do": "logits", "ids": list(ids), "out": str(out), "setting": self._setting("pp")})

    def _setting(self, kind: str) -> Any:
        settings = self.about.get("settings") or [{}]
        return next((s for key, s in self._chosen.items() if key[0] == kind), settings[0])

    def work(self) -> Work:
        """Return what the model costs as this engine stores it."""
        return Work(**self.about["work"])

    def describe(self) -> dict[str, Any]:
        """Return version, build flags and the like."""
        hidden = ("settings", "work", "fixed", "energy_source", "peak_memory")
        return {k: v for k, v in self.about.items() if k not in hidden}

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is None:
            return
        with contextlib.suppress(OSError):
            if child.stdin:
                child.stdin.close()
        try:
            child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            _kill(child)
        self._errors.close()

    def ask(self, question: dict[str, Any], patience: float | None = None) -> dict[str, Any]:
        """Send a question and return the answer; EngineError when the child dies, hangs or refuses."""
        child, seconds = self._child, patience or self.patience.answer
        if child is None or child.stdin is None:
            raise EngineError(f"{self.name} is not running")
        try:
            child.stdin.write(json.dumps(question) + "\n")
            child.stdin.flush()
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            _kill(child)
            raise EngineError(
                f"{self.name} gave no answer to {question['do']!r} in {seconds:.0f} s and was ended",
                "timeout",
            ) from None
        except OSError:
            line = ""
        if not line:
            raise EngineError(f"{self.name} stopped (exit {child.wait()}): {self.last_words(child.poll())}")
        try:
            answer = json.loads(line)
        except ValueError:  # it died in the middle of a line
            _kill(child)
            raise EngineError(f"{self.name} gave half an answer: {self.last_words(child.poll())}") from None
        if answer.get("peak_memory"):
            self.peak_memory = answer["peak_memory"]
        if "error" in answer:
            raise EngineError(f"{self.name}: {answer['error']}")
        return answer

    def last_words(self, code: int | None) -> str:
        """Return the end of what a dead child wrote."""
        self._errors.seek(0)
        return self._errors.read().strip()[-600:] or "no word"


def _kill(child: subprocess.Popen[str]) -> None:
    """End a child that hangs, and what it started: compile workers of a peer would go on without it."""
    import psutil

    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(child.pid).children(recursive=True)
    child.kill()
    for process in family:
        with contextlib.suppress(psutil.Error):
            process.kill()
    child.wait()


def _pump(source: IO[str], lines: queue.Queue[str]) -> None:
    """Move lines to where they can be waited for; an empty one is the end."""
    with contextlib.suppress(ValueError, OSError):
        for line in source:
            lines.put(line)
        source.close()
    lines.put("")


def cold_start(open_engine: Callable[[], ChildEngine], prompt: int) -> tuple[float, int | None]:
    """Return the seconds from starting a process to its first token, and its peak memory until then."""
    start = time.perf_counter()
    engine = open_engine()
    try:
        engine.query(prompt, 1)
        return time.perf_counter() - start, engine.peak_memory
    finally:
        engine.close()


def peak_memory() -> int | None:
    """Return the most bytes that this process has had in memory, its own start included.

    On Linux from /proc: what getrusage tells begins with the peak of the process that started this one.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    from .device import peak_memory as of_usage

    return of_usage()


def serve(make: Callable[[str], Runner]) -> None:
    """Answer questions until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    path, runner, clock = sys.argv[1], None, Clock()
    for line in sys.stdin:
        question = json.loads(line)
        try:
            runner = runner or make(path)
            answer = _answer(runner, question, clock)
        except Exception as error:  # noqa: BLE001  the parent raises it again
            text = str(error) if isinstance(error, EdgeFormerError) else f"{type(error).__name__}: {error}"
            answer = {"error": text}
        print(json.dumps({**answer, "peak_memory": peak_memory()}), file=answers, flush=True)


def _answer(runner: Runner, question: dict[str, Any], clock: Clock) -> dict[str, Any]:
    do = question.pop("do")
    if do == "load":
        about = runner.load(**question)
        if gpu := about.get("gpu"):
            clock.meter = Meter(gpu=gpu)
        return {**about, "energy_source": clock.meter.source}
    setting = question.pop("setting", None)
    if do == "time":
        runner.time(Test(**question["test"]), setting, clock)
        return {"seconds": clock.seconds, "joules": clock.joules}
    if do == "query":
        first, last = runner.query(question["prompt"], question["generate"], question["batch"], setting)
        return {"first": first, "last": last}
    if do == "logits":
        runner.logits(question["ids"], Path(question["out"]), setting)
        return {}
    return getattr(runner, do)(**question) or {}
