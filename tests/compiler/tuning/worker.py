"""A tuner in a process of its own, on problems whose times are known: FOLDER slow|fast|share NUMBER."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import conftest as planted

from edgeformer.compiler.journal import Journal
from edgeformer.compiler.records import RecordStore
from edgeformer.compiler.tuner import tune


class Slow(planted.Fake):
    """Takes some milliseconds a trial, and says how many there were."""

    def trial(self, problem, configuration, seconds=1e9):
        time.sleep(0.003 if kind != "fast" else 0)
        found = super().trial(problem, configuration)
        if kind == "share":
            print("trial", problem.title, sorted(configuration.items()), flush=True)
        return found


root, kind = Path(sys.argv[1]), sys.argv[2]
journal, records, fake = Journal(root), RecordStore(root, shipped=root / "none"), Slow()
print("begun", flush=True)
count = 8 if kind == "share" else 3


def say(event: object) -> None:
    """Say how many trials are durable."""
    if kind == "slow":
        print("trials", sum(p.trials for p in journal.progress()), flush=True)


problems = [planted.make_problem(f"problem{i}") for i in range(count)]
for _ in range(6 if kind == "share" else 1):  # rounds: what is busy now is finished in a later one
    outcomes = tune(
        problems, fake, records, journal, seconds=1e6, versions=planted.VERSIONS, clock=fake.clock,
        progress=say,
    )  # fmt: skip
    for outcome in outcomes:
        if outcome.state == "tuned":
            print("tuned", outcome.problem.title, flush=True)
        assert outcome.state in ("tuned", "kept", "busy"), outcome
