"""The tuning loop: problems share a time budget; trials go to the journal, winners to the records."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any, Protocol

from .errors import EdgeFormerError
from .journal import GOOD, NOISY, Journal, Trial
from .lookup import Wanted
from .measure import Measured, wins
from .records import Record, RecordStore
from .search import Evolution
from .space import Space

GOES_ON = "the search can go on"
TOP = 4  # candidates that are timed again, in turn with what ran before
PASSES = 15  # of that last comparison
PATIENCE = 32  # trials in a row without a better one that end a search
_KEPT_SECONDS = 0.15  # part of a problem's time that is left for the last comparison, at least
_OVERTIME = 0.25  # of its time, by which that comparison may run over; what is longer is called off
_LEAST_OVERTIME = 5.0  # seconds


@dataclass(frozen=True)
class Problem:
    """One thing to tune: what a record of it will be about, the space of its phase, and its importance.

    `request` is what the evaluator needs to know; it pickles.
    """

    title: str
    wanted: Wanted
    space: Space
    request: Any
    weight: float = 1.0

    @property
    def key(self) -> str:
        """The problem's name in the journal."""
        return self.wanted.empty({}).key


class OutOfTime(EdgeFormerError):
    """An evaluation was called off because the budget was spent; that says nothing of its configuration."""


class Evaluator(Protocol):
    """Builds, checks and times configurations. Raises nothing for a bad one: its Trial says so.

    One with a `source` of "static" ranks by generated code: its seconds are costs that compare with each
    other alone, and no record keeps them. What is not done within `seconds` is called off: OutOfTime.
    """

    def trial(self, problem: Problem, configuration: Mapping[str, Any], seconds: float) -> Trial:
        """Check a configuration against the reference, and time it in turn with the default."""
        ...

    def compare(
        self, problem: Problem, configurations: Sequence[Mapping[str, Any]], passes: int, seconds: float
    ) -> Measured:
        """Time right configurations in turn. Raises BuildError when one cannot be built again."""
        ...


@dataclass(frozen=True)
class Event:
    """What the progress callback gets: `kind` is "problem", "trial" or "record"; None where it says nothing.

    `best` is the best ratio to the default so far; `seconds_left` of the whole budget; `done` of `total`
    problems are finished.
    """

    kind: str
    problem: Problem
    trials: int
    best: float
    seconds_left: float
    done: int
    total: int
    trial: Trial | None = None
    record: Record | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a problem: "tuned", "kept" (a record was there, and nothing new was found), "busy"
    (another tuner has it), "failed", "stopped" (the budget was spent before its search ended); trials made
    now; the record, if there is one.
    """

    problem: Problem
    state: str
    trials: int
    record: Record | None = None
    note: str = ""


def tune(
    problems: Sequence[Problem],
    evaluator: Evaluator,
    records: RecordStore,
    journal: Journal,
    *,
    seconds: float,
    versions: Mapping[str, str],
    most_trials: int = 1 << 30,
    more: bool = False,
    progress: Callable[[Event], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    seed: int = 0,
) -> list[Outcome]:
    """Tune each problem within its share of `seconds`, by weight; what one leaves goes to the next.

    A problem with a record of the user's own is left alone, unless `more` is asked for: then its search goes
    on, and a new winner has to beat the record. With `most_trials` 0 nothing is tried: the best so far are
    timed again, which settles what was searched while the machine was busy. A problem that another tuner
    works on is left to it. What goes on when the budget is spent is called off soon after (_OVERTIME).
    Ctrl-C (KeyboardInterrupt) passes through; every trial that ended is in the journal.
    """
    end = clock() + seconds
    own = {record.key: record for record, origin in records.all() if origin == "yours"}
    outcomes: list[Outcome] = []
    waiting = []
    for problem in problems:
        if problem.key in own and not more:
            outcomes.append(Outcome(problem, "kept", 0, own[problem.key]))
        else:
            waiting.append(problem)
    for at, problem in enumerate(waiting):
        total = sum(p.weight for p in waiting[at:])
        share = (end - clock()) * problem.weight / total
        with journal.claim(problem.key) as mine:
            if not mine:
                outcomes.append(Outcome(problem, "busy", 0))
                continue
            fresh = next((r for _, r in records.files() if r.key == problem.key), None)
            if fresh is not None and not more:  # another tuner finished it meanwhile
                outcomes.append(Outcome(problem, "kept", 0, fresh))
                continue
            say = _Speaker(progress, problem, end, clock, len(outcomes), len(problems))
            search = _Search(problem, evaluator, records, journal, versions, fresh, clock, seed, say)
            outcomes.append(search.run(clock() + share, most_trials))
    return outcomes


@dataclass
class _Speaker:
    progress: Callable[[Event], None] | None
    problem: Problem
    end: float
    clock: Callable[[], float]
    done: int
    total: int

    def __call__(self, kind: str, trials: int, best: float, **more: Any) -> None:
        if self.progress is not None:
            left = max(0.0, self.end - self.clock())
            self.progress(Event(kind, self.problem, trials, best, left, self.done, self.total, **more))


@dataclass
class _Search:
    problem: Problem
    evaluator: Evaluator
    records: RecordStore
    journal: Journal
    versions: Mapping[str, str]
    old: Record | None
    clock: Callable[[], float]
    seed: int
    say: _Speaker
    called_off: str = ""

    def run(self, end: float, most_trials: int) -> Outcome:
        problem, key = self.problem, self.problem.key
        search = Evolution(problem.space, self.seed)
        trials = self.journal.trials(key)
        started, made, first, settling = self.clock(), 0, len(trials), not most_trials
        self.say("problem", first, _best(trials))
        ended = "stopped"
        limit = end + max(_OVERTIME * (end - started), _LEAST_OVERTIME)
        each = 0.0  # seconds of the shortest trial but the first, which also makes inputs and references
        width = getattr(self.evaluator, "width", 1)
        pending: dict[Future[Trial], tuple[dict[str, Any], float]] = {}
        with _Inline() if width == 1 else ThreadPoolExecutor(width) as pool:
            while ended == "stopped" or pending:
                while ended == "stopped" and len(pending) < width and made + len(pending) < most_trials:
                    now = self.clock()
                    if now >= end - max(_KEPT_SECONDS * (end - started), 2 * each):
                        most_trials = 0
                        break
                    under_way = [Trial(c, "running") for c, _ in pending.values()]
                    configuration = (
                        None if _patience_is_over(trials) else search.propose([*trials, *under_way])
                    )
                    if configuration is None:
                        ended = "tuned"
                    elif not self.journal.start(key, problem.title, configuration):
                        trials.append(Trial(configuration, "crash", note="tried before"))
                    else:
                        future = pool.submit(self.evaluator.trial, problem, configuration, limit - now)
                        pending[future] = (configuration, now)
                if not pending:
                    break
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    configuration, begun = pending.pop(future)
                    trial = self._ended(future, configuration, pending)
                    if trial is None:
                        most_trials = 0
                        continue
                    trials.append(trial)
                    made += 1
                    took = self.clock() - begun
                    each = min(each or took, took) if made > width else 0.0
                    self.say("trial", len(trials), _best(trials), trial=trial)
        if not trials and ended == "stopped":
            note = self.called_off or "the time was over before its first trial"
            return Outcome(problem, "stopped", made, self.old, note)
        if not made and self.old is not None and not settling:  # nothing is new: the record stands
            self.journal.settle(key, ended == "tuned")
            return Outcome(problem, "kept", 0, self.old)
        return self._conclude(trials, made, ended, each, limit)

    def _ended(
        self, future: Future[Trial], configuration: dict[str, Any], others: Mapping[Future[Trial], Any]
    ) -> Trial | None:
        """Return a trial, durable; None when it was called off. Ctrl-C calls off the others too."""
        key = self.problem.key
        try:
            trial = future.result()
        except OutOfTime as error:
            self.journal.abandon(key, configuration)
            self.called_off = str(error).removeprefix(f"{self.problem.title}: ")  # its row has the title
            return None
        except BaseException:
            for other, _ in [(configuration, 0), *others.values()]:
                self.journal.abandon(key, other)
            raise
        self.journal.finish(key, trial)
        return trial

    def _conclude(self, trials: list[Trial], made: int, ended: str, each: float, limit: float) -> Outcome:
        """Time the best in turn with the default (and the old record's), and store what won.

        What was tried in an earlier run has to be built again, at about `each` seconds: as many of the best
        take part as the time allows, at least one.
        """
        problem = self.problem
        default = problem.space.default
        old = problem.space.complete(self.old.configuration) if self.old else default
        rivals = [default] + ([old] if old != default else [])
        right = [t for t in trials if t.status in (GOOD, NOISY) and t.ratio is not None]
        right.sort(key=lambda t: (t.status == NOISY, t.ratio))
        top = [t.configuration for t in right[:TOP] if t.configuration not in rivals]
        fresh = [t.configuration for t in trials[len(trials) - made :]]
        left = limit - self.clock() - each * sum(c not in fresh for c in rivals[1:])
        chosen = []
        for configuration in top:
            left -= 0.0 if configuration in fresh else each
            if not chosen or left > 0:
                chosen.append(configuration)
        entered = [*rivals, *chosen]
        try:
            measured = self.evaluator.compare(problem, entered, PASSES, limit - self.clock())
        except OutOfTime:
            note = "the time was over before the best were compared; more of it goes on from here"
            return Outcome(problem, "stopped", made, self.old, note)
        except EdgeFormerError as error:
            return Outcome(problem, "failed", made, self.old, str(error))
        return self._record(entered, len(rivals) - 1, measured, trials, made, ended)

    def _record(
        self, entered: list[dict[str, Any]], incumbent: int, measured: Measured, trials: list[Trial],
        made: int, ended: str,
    ) -> Outcome:  # fmt: skip
        """Store the winner: what is faster than the incumbent by more than the spread, else the incumbent."""
        problem, times = self.problem, measured.times
        best = min(range(len(times)), key=lambda i: measured.samples[i].seconds)
        if best != incumbent and not wins(times[incumbent], times[best]):
            best = incumbent
        if best == 1 == incumbent and not wins(times[0], times[1]):  # it no longer beats the default
            best = 0
        sample = measured.samples[best]
        static = getattr(self.evaluator, "source", "measured") == "static"
        ratio = sample.seconds / measured.samples[0].seconds
        record = replace(
            problem.wanted.empty(problem.space.essential(entered[best])),
            seconds=0.0 if static else sample.seconds,
            spread=0.0 if static else sample.spread,
            default_seconds=0.0 if static else measured.samples[0].seconds,
            trials=len(trials),
            source="static" if static else "measured",
            versions=dict(self.versions),
        )
        self.records.put(record)
        self.journal.settle(problem.key, ended == "tuned")
        self.say("record", len(trials), ratio, record=record)
        notes = [f"ranked by its code: {ratio:.2f} of the default's cost"] if static else []
        notes += [] if ended == "tuned" else [GOES_ON]
        return Outcome(problem, "tuned", made, record, "; ".join(notes))


class _Inline:
    """An executor that runs what it is given at once, in this thread: Ctrl-C reaches it."""

    def __enter__(self) -> _Inline:
        return self

    def __exit__(self, *ignored: object) -> None:
        return None

    def submit(self, call: Callable[..., Trial], *arguments: Any) -> Future[Trial]:
        """Return a future that is done."""
        future: Future[Trial] = Future()
        try:
            future.set_result(call(*arguments))
        except BaseException as error:  # noqa: BLE001  raised where the result is asked for
            future.set_exception(error)
        return future


def _best(trials: Sequence[Trial]) -> float:
    return min((t.ratio for t in trials if t.status == GOOD and t.ratio is not None), default=1.0)


def _patience_is_over(trials: Sequence[Trial]) -> bool:
    best, since = 1.0, 0
    for trial in trials:
        since += 1
        if trial.ratio is not None and trial.status == GOOD and trial.ratio < best * 0.99:
            best, since = trial.ratio, 0
    return since >= PATIENCE
