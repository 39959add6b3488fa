"""Which search finds better configurations in the same time: a table is measured once, searches replay it.

    python -m edgeformer.bench.search_methods measure --folder DIR   # builds, checks, times; quiet machine
    python -m edgeformer.bench.search_methods compare --folder DIR   # replays searches over the table

Each member of a problem's space (cut to some hundred members, see CUT) is built, checked and timed in turn
with the default. A search then pays for a trial what that member's trial took, so that many seeds of it cost
nothing. The row of Optuna needs the package `optuna`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..compiler.journal import GOOD, Trial
from ..compiler.records import write_text
from ..compiler.search import Evolution
from ..compiler.space import Constraint, Space
from ..compiler.target import Target, available_cores
from ..compiler.tuner import Problem
from .tuned import problems

CHOSEN = (
    "135M gate-up M=8",
    "1B down M=8",
    "1B gate-up M=1",
    "attention prefill 9/3x64 at 512",
    "135M down M=8",
)
CUT = {"gemm_from": 2, "large_rows": 1, "prefetch": 4}  # values of an axis that take part, the first ones
Table = dict[str, Trial]  # by the configuration's text


def chosen(target: Target) -> list[tuple[str, Problem]]:
    """Return the problems that are compared."""
    found = []
    for name, problem in problems(target, available_cores()):
        if name in CHOSEN:
            axes = (
                dataclasses.replace(axis, values=axis.values[: CUT.get(axis.name)])
                for axis in problem.space.axes
            )
            space = dataclasses.replace(problem.space, axes=tuple(axes))
            found.append((name, dataclasses.replace(problem, space=space)))
    return found


def fill(folder: Path, target: Target, wall: float) -> None:
    """Try members of each space in random order until `wall` seconds are over; what was tried stays."""
    from ..runtime.tuning import ChildEvaluator

    end, found = time.monotonic() + wall, chosen(target)
    folder.mkdir(parents=True, exist_ok=True)
    with ChildEvaluator() as evaluator:
        for at, (name, problem) in enumerate(found):
            until = time.monotonic() + (end - time.monotonic()) / (len(found) - at)
            path = folder / f"{name.replace(' ', '_').replace('/', '-')}.json"
            rows = json.loads(path.read_text()) if path.exists() else []
            known = {key(row["configuration"]) for row in rows}
            members = [c for c in problem.space if c != problem.space.default and key(c) not in known]
            random.Random(0).shuffle(members)
            for configuration in members:
                if time.monotonic() > until:
                    break
                start = time.monotonic()
                trial = evaluator.trial(problem, configuration)
                rows.append(dataclasses.asdict(trial) | {"took": time.monotonic() - start})
                write_text(path, json.dumps(rows))
            print(f"{name}: {len(rows)} of {len(problem.space) - 1} members", flush=True)


def key(configuration: Any) -> str:
    """Return a configuration as text."""
    return json.dumps(dict(configuration), sort_keys=True)


Propose = Callable[[list[Trial]], Any]


def evolution(space: Space, seed: int) -> Propose:
    """Return our own search, as it goes through spaces that are too large to be tried whole."""
    search = Evolution(space, seed)
    search._all = None
    return search.propose


def at_random(space: Space, seed: int) -> Propose:
    """Return members in random order: what every search has to beat."""
    members = [c for c in space if c != space.default]
    random.Random(seed).shuffle(members)
    return lambda trials: members[len(trials)] if len(trials) < len(members) else None


def tpe(space: Space, seed: int) -> Propose:
    """Return Optuna's tree-structured Parzen estimator, which may propose what it has seen."""
    optuna: Any = importlib.import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True)
    study = optuna.create_study(sampler=sampler)
    asked: list[Any] = []
    tried: set[str] = {key(space.default)}

    def propose(trials: list[Trial]) -> Any:
        if asked:
            trial, last = asked[-1], trials[-1]
            study.tell(trial, last.ratio if last.ratio is not None else 10.0)
        for _ in range(50):
            trial = study.ask()
            found = {axis.name: trial.suggest_categorical(axis.name, axis.values) for axis in space.axes}
            if not space.refusal(found) and key(found) not in tried:
                tried.add(key(found))
                asked.append(trial)
                return found
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return None

    return propose


METHODS = {"evolution": evolution, "optuna TPE": tpe, "random": at_random}


def replay(
    make: Callable[[Space, int], Propose], space: Space, table: dict[str, Any], seconds: float, seed: int
) -> float:
    """Return the best ratio to the default that a search finds in a table within `seconds`.

    Its space is the members that the table holds.
    """
    measured = Constraint("it was measured", lambda c: key(c) in table or c == space.default)
    held = dataclasses.replace(space, constraints=(*space.constraints, measured))
    propose, trials, left, best = make(held, seed), [], seconds, 1.0
    while len(trials) < len(table) and (configuration := propose(trials)) is not None:
        row = table[key(configuration)]
        left -= row["took"]
        if left < 0:
            break
        trials.append(Trial(configuration, row["status"], row["ratio"]))
        if row["status"] == GOOD and row["ratio"] is not None:
            best = min(best, row["ratio"])
    return best


def compare(folder: Path, target: Target, budgets: tuple[float, ...], seeds: int) -> str:
    """Return a Markdown table: the best ratio by search and time over seeds, and the best there is."""
    lines = ["| problem | members | seconds | " + " | ".join(METHODS) + " | best there is |"]
    lines.append("| --- |" + " --- |" * (len(METHODS) + 3))
    for name, problem in chosen(target):
        path = folder / f"{name.replace(' ', '_').replace('/', '-')}.json"
        if not path.exists():
            continue
        rows = json.loads(path.read_text())
        table = {key(row["configuration"]): row for row in rows}
        good = [row["ratio"] for row in rows if row["status"] == GOOD and row["ratio"] is not None]
        for seconds in budgets:
            cells = []
            for make in METHODS.values():
                found = [replay(make, problem.space, table, seconds, seed) for seed in range(seeds)]
                low, middle, high = statistics.quantiles(found, n=4)
                cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
            best = min(good, default=1.0)
            lines.append(f"| {name} | {len(rows)} | {seconds:g} | {' | '.join(cells)} | {best:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("do", choices=("measure", "compare"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--target", default="auto")
    parser.add_argument("--wall", type=float, default=600.0)
    parser.add_argument("--budgets", type=float, nargs="+", default=[5.0, 15.0])
    parser.add_argument("--seeds", type=int, default=40)
    options = parser.parse_args()
    target = Target.parse(options.target)
    target = dataclasses.replace(target, l3=target.l3 or Target.parse("auto").l3)
    if options.do == "measure":
        fill(options.folder, target, options.wall)
    else:
        print(compare(options.folder, target, tuple(options.budgets), options.seeds))


if __name__ == "__main__":
    main()
