"""Problems whose times are known, so that no test of tuning depends on a clock or a compiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edgeformer.compiler.journal import GOOD, Journal, Trial
from edgeformer.compiler.lookup import Wanted
from edgeformer.compiler.measure import Measured, Sample
from edgeformer.compiler.records import RecordStore
from edgeformer.compiler.space import Axis, Constraint, Space
from edgeformer.compiler.target import Target
from edgeformer.compiler.tuner import Outcome, Problem, tune

TARGET = Target("test", "x86_64", "znver5", "avx512_vnni", cores=2)
VERSIONS = {"apache-tvm": "0.27.0", "torch": "2.13.0"}


def make_space(extra: tuple[Axis, ...] = ()) -> Space:
    """Return 4 x 3 x 3 members but those that a constraint refuses."""
    axes = (Axis("rows", (4, 2, 8, 12)), Axis("ahead", (0, 1024, 4096)), Axis("place", (3, 1, 0)), *extra)
    rule = Constraint("no place without prefetch", lambda c: bool(c["ahead"]) or c["place"] == 3)
    return Space(axes, (rule,))


def make_problem(name: str = "n=64", space: Space | None = None, **sizes: int) -> Problem:
    space = space or make_space()
    sizes = {"n": 64, "k": 64, "m": 1} | sizes
    wanted = Wanted("matmul", "tvm_cpu", space.signature, f"int4 {name}", "gemv", sizes, 2, TARGET)
    return Problem(name, wanted, space, None)


def time_of(configuration: Mapping[str, Any]) -> float:
    """Return the seconds of a configuration: best at rows=8, ahead=4096, place=1."""
    return 1e-6 * (
        10
        + abs(configuration["rows"] - 8)
        + (4096 - configuration["ahead"]) / 1024
        + configuration["place"] / 2
    )


@dataclass
class Fake:
    """An evaluator with known times; `status(configuration)` may say that a candidate is bad."""

    status: Callable[[Mapping[str, Any]], str] = lambda c: GOOD
    seconds: Callable[[Mapping[str, Any]], float] = time_of
    tried: list[dict[str, Any]] = field(default_factory=list)
    clock_step: float = 1.0
    now: float = 0.0

    def clock(self) -> float:
        return self.now

    def trial(self, problem: Problem, configuration: Mapping[str, Any], seconds: float = 1e9) -> Trial:
        self.tried.append(dict(configuration))
        self.now += self.clock_step
        status = self.status(configuration)
        if status != GOOD:
            return Trial(dict(configuration), status, note="planted")
        seconds = self.seconds(configuration)
        return Trial(dict(configuration), GOOD, seconds / self.seconds(problem.space.default), seconds, 0.0)

    def compare(
        self,
        problem: Problem,
        configurations: Sequence[Mapping[str, Any]],
        passes: int,
        seconds: float = 1e9,
    ) -> Measured:
        times = tuple(tuple([self.seconds(c)] * passes) for c in configurations)
        return Measured(tuple(Sample.of(t) for t in times), times, 0.0, 1)


@dataclass
class Folder:
    """A cache folder with its journal and records."""

    root: Path
    journal: Journal
    records: RecordStore

    def tune(
        self, problems: Sequence[Problem], fake: Fake, seconds: float = 1000.0, **more: Any
    ) -> list[Outcome]:
        return tune(
            problems,
            fake,
            self.records,
            self.journal,
            seconds=seconds,
            versions=VERSIONS,
            clock=fake.clock,
            **more,
        )


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    root = tmp_path / "cache"
    return Folder(root, Journal(root), RecordStore(root, shipped=tmp_path / "none"))
