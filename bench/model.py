"""Times a whole model as llama-bench does: engines interleaved, limits and a fixed probe in the same run."""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..compiler.errors import EdgeFormerError, FormatError
from ..compiler.target import available_cores
from . import quality, scenarios
from .check import HIGHEST_FRACTION, DeviceCheck, fixed_probe, read_load, turn_limits
from .child import ChildEngine, EngineError, Shape, cold_start
from .device import versions
from .fleet import OURS, Fleet, Problem
from .journal import Journal
from .options import Options
from .probes import Limits, measure_limits
from .provenance import commit, fingerprint, new_run_id, now
from .rows import RunFacts, build_rows, model_size
from .turns import PAUSE, Rounds, Turns, problem_of
from .work import Test

REST = 0.3  # seconds before a probe, which must see the machine and not an engine's spinning threads
FIRST_TOKENS, COLD_STARTS = 3, 2  # repeats of the time to the first token, at most


class MeasurementError(EdgeFormerError):
    """A measurement contradicts itself, or the device is not fit, so none of its figures can be trusted."""


def bench(
    path: Path, options: Options, progress: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Measure a model file and return one row a test and engine; see `require_plausible`.

    What has been measured is kept at once; after a kill, `options.resume` goes on with it. An engine that is
    missing, crashes or hangs has rows that say so. Raises MeasurementError with `options.strict` when the
    device check finds something.
    """
    options.check()
    if not path.exists():
        raise FormatError(f"there is no file {path}")
    journal = Journal(_identity(path, options), options.resume)
    if journal.units:
        progress(f"resuming: {len(journal.units)} parts are measured already")
    rows: list[dict[str, Any]] = []
    for threads in options.threads or (available_cores(),):
        rows += ModelRun(path, options, threads, journal, progress).rows()
    journal.done()
    return rows


def _identity(path: Path, options: Options) -> dict[str, Any]:
    file = [str(path.resolve()), model_size(path), path.stat().st_mtime_ns]
    same = {"commit": commit(), "device": fingerprint(), "versions": versions()}
    return {"file": file, "options": options.identity(), **same}


class ModelRun:
    """One run at one number of threads."""

    def __init__(
        self, path: Path, options: Options, threads: int, journal: Journal, progress: Callable[[str], None]
    ) -> None:
        self.path, self.options, self.threads = path, options, threads
        self.journal, self.progress = journal, progress
        self.session = uuid.uuid4().hex[:8]
        self.fleet = Fleet(path, Shape(threads, *options.shape()), options, progress)
        self.limits: Limits | None = None
        self.check = DeviceCheck(
            threads, available_cores(), lambda: fixed_probe(threads), self.fleet.processes
        )

    def rows(self) -> list[dict[str, Any]]:
        """Measure what the journal does not hold yet; return the rows."""
        run = self._unit("run", lambda: {"run_id": new_run_id(), "time": now()})
        try:
            if not self._finished():
                self._measure()
        finally:
            self.fleet.close()
        facts = RunFacts(self.path, self.options, self.threads, run["run_id"], run["time"], self._units())
        return build_rows(facts)

    def _finished(self) -> bool:
        return f"{self.threads}/end" in self.journal

    def _measure(self) -> None:
        names, test_units = self.fleet.names, self.options.tests()
        for name in names:  # before any waiting, so that what is missing is told first
            self.fleet.engine(name)
        self.progress("checking the device and measuring its limits")
        self._refuse(self.check.before())
        self._measure_limits()
        for test in test_units:
            self._unit(f"speed:{test.name}", lambda test=test: self._speed(test))
        for name in names:
            self._unit(f"about:{name}", lambda name=name: self._about(name))
        if self.options.ttft and self.options.query[0]:
            self._unit("ttft", self._time_to_first_token)
        for scenario in self.options.scenarios:
            self._unit(f"scenario:{scenario}", lambda scenario=scenario: self._scenario(scenario))
        if self.options.quality_tokens:
            self._unit("quality", self._quality)
        time.sleep(REST)
        warnings = self.check.after()
        self._keep(f"check:{self.session}", self.check.row())
        for text in warnings:
            self.progress(f"warning: {text}")
        self._keep("end", {})
        self._refuse(warnings)

    def _refuse(self, warnings: Sequence[str]) -> None:
        if self.options.strict and warnings:
            raise MeasurementError(f"--strict: {'; '.join(warnings)}")

    def _measure_limits(self) -> None:
        limits = measure_limits(self.threads, target=self.options.target)
        self.limits = limits if self.limits is None else self.limits.best(limits)

    # The parts of a run. Each returns what the journal keeps.

    def _speed(self, test: Test) -> dict[str, Any]:
        """Time a test of every engine, in turns."""
        load = lambda: read_load(self.fleet.processes())  # noqa: E731
        probe = lambda: turn_limits(self.threads, self.options.target)  # noqa: E731
        turns = Turns(self.fleet, test, probe, load, self.progress)
        found = turns.measure(Rounds(self.options.repeats, self.options.seconds * len(self.fleet.names)))
        time.sleep(REST)
        self.check.again()
        self._measure_limits()
        assert self.limits is not None
        probes = [probe for engine in found.values() for both in engine.get("probes", ()) for probe in both]
        self.limits = self.limits.raised(probes)
        return {"engines": found, "limits": asdict(self.limits), "session": self.session}  # pyright: ignore[reportArgumentType]

    def _about(self, name: str) -> dict[str, Any]:
        def about(engine: ChildEngine) -> dict[str, Any]:
            facts = {
                "work": asdict(engine.work()),
                "details": engine.describe(),
                "energy_source": engine.energy_source,
            }
            if name == OURS and hasattr(engine, "layers"):
                facts["records"] = _records(engine.layers())  # pyright: ignore[reportAttributeAccessIssue]
            return facts

        found = self.fleet.attempt(name, about)
        return problem_of(found) if isinstance(found, Problem) else found

    def _time_to_first_token(self) -> dict[str, Any]:
        """Time a prompt to its first token, in a running engine and in a new process of it."""
        prompt, _ = self.options.query
        found: dict[str, dict[str, Any]] = {name: {"warm": [], "cold": []} for name in self.fleet.names}
        repeats = min(FIRST_TOKENS, self.options.repeats or FIRST_TOKENS)
        for repeat in range(repeats + 1):
            self.progress(f"time to first token: repeat {repeat} of {repeats}")
            for name in self._turn(repeat):
                time.sleep(PAUSE)
                seconds = self.fleet.attempt(name, lambda engine: engine.query(prompt, 1)[0])
                if isinstance(seconds, Problem):
                    found[name] |= problem_of(seconds)
                elif repeat:  # the first is a warm-up
                    found[name]["warm"].append(seconds)
        for repeat in range(min(COLD_STARTS, self.options.repeats or COLD_STARTS)):
            for name in self._turn(repeat):
                self.progress(f"time to first token of a new process: {name}")
                if "problem" in found[name] or name in self.fleet.problems:
                    continue
                shape = Shape(self.threads, self.fleet.shape.context)
                try:
                    seconds, peak = cold_start(
                        lambda name=name, shape=shape: self.fleet.open(name, shape), prompt
                    )
                except EngineError as error:
                    found[name] |= problem_of(Problem(error.status, str(error)))
                    continue
                found[name]["cold"].append(seconds)
                found[name]["peak_memory"] = max(peak or 0, found[name].get("peak_memory", 0)) or None
        return found

    def _scenario(self, scenario: str) -> dict[str, Any]:
        """Let every engine answer all queries of a scenario, query by query in turns."""
        prompt, generate = self.options.query
        found: dict[str, Any] = {name: {"queries": []} for name in self.fleet.names}
        sizes = scenarios.plan(scenario, self.options.queries)
        for i, samples in enumerate([sizes[0], *sizes]):  # the first is a warm-up
            self.progress(f"{scenario}: query {i} of {len(sizes)}")
            for name in self._turn(i):
                if "problem" in found[name]:
                    continue
                time.sleep(PAUSE)
                answered = self.fleet.attempt(
                    name, lambda engine, n=samples: scenarios.run_query(engine, n, prompt, generate)
                )
                if isinstance(answered, Problem):
                    found[name] |= problem_of(answered)
                elif i:
                    found[name]["queries"].append(answered)
        time.sleep(REST)
        self.check.again()
        return found

    def _quality(self) -> dict[str, Any]:
        """Compare every engine's logits with fp32 PyTorch on the file's own weights."""
        self.progress("quality: the fp32 reference")
        ours = self.fleet.engine(OURS)
        assert ours is not None
        with tempfile.TemporaryDirectory() as folder:
            try:
                ids = ours.tokens(quality.english(), self.options.quality_tokens)  # pyright: ignore[reportAttributeAccessIssue]
                windows = quality.windows_of(ids)
                ours.reference(windows, Path(folder))  # pyright: ignore[reportAttributeAccessIssue]
            except EngineError as error:
                return {name: quality.unavailable(str(error)) for name in self.fleet.names}
            found = {}
            for name in self.fleet.names:
                self.progress(f"quality: {name}")
                judged = self.fleet.attempt(
                    name, lambda engine: quality.judge(windows, Path(folder), engine.logits)
                )
                found[name] = quality.unavailable(judged.text) if isinstance(judged, Problem) else judged
        return found

    def _turn(self, by: int) -> list[str]:
        names = self.fleet.names
        return [names[(i + by) % len(names)] for i in range(len(names))]

    # The journal's units of this number of threads.

    def _unit(self, name: str, measure: Callable[[], Any]) -> Any:
        kept = self.journal.get(f"{self.threads}/{name}")
        return self._keep(name, measure()) if kept is None else kept

    def _keep(self, name: str, data: Any) -> Any:
        return self.journal.keep(f"{self.threads}/{name}", data)

    def _units(self) -> dict[str, Any]:
        prefix = f"{self.threads}/"
        return {k.removeprefix(prefix): v for k, v in self.journal.units.items() if k.startswith(prefix)}


def _records(layers: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return how many layers' configurations came from which record ("default": none was tuned)."""
    found: dict[str, int] = {}
    for row in layers:
        if record := row.get("record"):
            found[str(record)] = found.get(str(record), 0) + 1
    return found


def require_plausible(rows: Sequence[dict[str, Any]]) -> None:
    """Raise MeasurementError when a row is above the limit that was measured beside it."""
    wrong = [r for r in rows if r["limit_fraction"] is not None and r["limit_fraction"] > HIGHEST_FRACTION]
    if wrong:
        texts = ", ".join(f"{r['engine']} {r['test']} at {r['limit_fraction']:.0%}" for r in wrong)
        raise MeasurementError(
            f"{texts} of the measured limit: the machine's speed changed during the run, or "
            "a probe is too slow. None of these figures count; run it again on a quieter machine"
        )
