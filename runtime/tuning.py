"""The parent's side of tuning: problems of operators, trials in a child process, records for dispatch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..compiler.child import Child, ChildError
from ..compiler.errors import BuildError
from ..compiler.journal import Journal, Trial
from ..compiler.lookup import Wanted, bucket
from ..compiler.measure import Measured
from ..compiler.operator import Form, Operator, Sizes
from ..compiler.records import RecordStore
from ..compiler.space import Space
from ..compiler.target import Target
from ..compiler.tuner import Evaluator, Event, Outcome, OutOfTime, Problem, tune
from .trial import ENDED_WITHIN, Limited, Request

_PREPARE_SECONDS = 240.0  # of the first trial: inputs and references of a large problem are made
_TRIAL_SECONDS = 90.0
_VERSIONED = ("edgeformer", "apache-tvm", "apache-tvm-ffi", "triton", "torch")


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of the tools that a result depends on, where they are installed."""
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def tools() -> str:
    """Return the tool versions that a check of a record holds for."""
    return " ".join(f"{name}={version}" for name, version in versions().items() if name != "torch")


def wanted(
    operator: Operator, form: Form, spec: Any, sizes: Sizes, target: Target, threads: int
) -> tuple[Wanted, Space] | None:
    """Return what a record of this problem is about, and its phase's space; None without tuning."""
    space = form.space(spec, target)
    if form.tuning is None or not isinstance(space, Space):
        return None
    phase = form.tuning.phase(spec, sizes)
    family, fixed = form.tuning.family(spec, target)
    named = fixed | {name: bucket(size) for name, size in sizes.items()}
    about = Wanted(operator.name, form.name, space.signature, family, phase, named, threads, target)
    return about, space.of_phase(phase)


def problem_of(
    operator: Operator,
    spec: Any,
    sizes: Sizes,
    target: Target,
    threads: int,
    weight: float = 1.0,
    title: str = "",
    fixed: bool = False,
) -> Problem | None:
    """Return the tuning problem of the first form of `operator` that takes `spec`, or None without one.

    With `fixed` also one whose space has the default alone.
    """
    form = next((f for f in operator.forms if f.decide(spec, target) is None), None)
    found = wanted(operator, form, spec, sizes, target, threads) if form else None
    if form is None or found is None or (len(found[1]) < 2 and not fixed):
        return None
    request = Request("trial", operator.name, form.name, spec, dict(sizes), target, threads)
    shown = " ".join(f"{name}={size}" for name, size in sizes.items())
    return Problem(title or f"{operator.name} {spec.key()} {shown}", *found, request, weight)


class ChildEvaluator:
    """Trials in a child process with a time limit (see compiler.tuner.Evaluator). Close it at the end."""

    def __init__(
        self,
        memory_bytes: int = 0,
        prepare_seconds: float = _PREPARE_SECONDS,
        trial_seconds: float = _TRIAL_SECONDS,
    ) -> None:
        # Its own loading and checking takes what records there are, and tunes nothing.
        environment = {"EDGEFORMER_TUNE": "cached"}
        self._child = Child(
            "edgeformer.runtime.trial:answer", memory_bytes=memory_bytes, environment=environment
        )
        self._prepared = ("", 0)
        self._prepare_seconds, self._trial_seconds = prepare_seconds, trial_seconds

    def trial(self, problem: Problem, configuration: Mapping[str, Any], seconds: float = math.inf) -> Trial:
        """Check and time a configuration; what goes wrong is its Trial's status."""
        try:
            return self._ask(problem, "trial", (configuration,), seconds=seconds)
        except ChildError as error:
            return Trial(dict(configuration), error.kind, note=str(error))

    def compare(
        self,
        problem: Problem,
        configurations: Sequence[Mapping[str, Any]],
        passes: int,
        seconds: float = math.inf,
    ) -> Measured:
        """Time configurations in turn. Raises BuildError when the child fails."""
        try:
            return self._ask(problem, "compare", tuple(configurations), passes, seconds)
        except ChildError as error:
            raise BuildError(f"{problem.title}: {error}") from error

    def limits(
        self,
        problem: Problem,
        configurations: Sequence[Mapping[str, Any]],
        passes: int,
        seconds: float = math.inf,
    ) -> Limited:
        """Time configurations and this machine's limits in turn. Raises BuildError when the child fails."""
        try:
            return self._ask(problem, "limits", tuple(configurations), passes, seconds)
        except ChildError as error:
            raise BuildError(f"{problem.title}: {error}") from error

    def check(self, problem: Problem, configuration: Mapping[str, Any]) -> str:
        """Return what is wrong with a configuration's results, or ""."""
        try:
            return self._ask(problem, "check", (configuration,))
        except ChildError as error:
            return f"{error.kind}: {error}"

    def static(self, problem: Problem, configuration: Mapping[str, Any]) -> tuple[int, int]:
        """Return (spills, instructions) of a configuration's code. Raises BuildError."""
        try:
            return self._ask(problem, "static", (configuration,))
        except ChildError as error:
            raise BuildError(f"{problem.title}: {error}") from error

    def close(self) -> None:
        """End the child."""
        self._child.close()

    def __enter__(self) -> ChildEvaluator:
        return self

    def __exit__(self, *ignored: object) -> None:
        self.close()

    def _ask(
        self,
        problem: Problem,
        do: str,
        configurations: tuple[Mapping[str, Any], ...],
        passes: int = 0,
        seconds: float = math.inf,
    ) -> Any:
        request = dataclasses.replace(
            problem.request, do=do, configurations=configurations, seconds=ENDED_WITHIN * seconds,
            **({"passes": passes} if passes else {}),
        )  # fmt: skip
        timeout = len(configurations) * self._trial_seconds
        state = (request.problem, self._child.starts)
        if state != self._prepared:
            timeout += self._prepare_seconds
        try:
            return self._child.ask(request, max(0.0, min(timeout, seconds)))
        except ChildError as error:
            if error.kind == "hang" and seconds < timeout:
                raise OutOfTime(f"{problem.title}: the time is over") from error
            raise
        finally:
            self._prepared = (request.problem, self._child.starts)


def tune_problems(
    problems: Sequence[Problem],
    *,
    seconds: float,
    root: Path | None = None,
    more: bool = False,
    most_trials: int = 1 << 30,
    progress: Callable[[Event], None] | None = None,
    evaluator: Evaluator | None = None,
) -> list[Outcome]:
    """Tune problems within `seconds`, on this machine or where `evaluator` does; see compiler.tuner.tune."""
    journal, records = Journal(root), RecordStore(root)
    try:
        with contextlib.ExitStack() as stack:
            where = evaluator or stack.enter_context(ChildEvaluator())
            return tune(
                problems, where, records, journal, seconds=seconds, versions=versions(), more=more,
                most_trials=most_trials, progress=progress,
            )  # fmt: skip
    finally:
        journal.close()
