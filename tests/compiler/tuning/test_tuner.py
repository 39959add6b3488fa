"""The tuning loop on problems whose times are known: what wins, what is kept, what is never tried again."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edgeformer.compiler.journal import GOOD, NOISY, Journal, Trial
from edgeformer.compiler.measure import Measured, Sample, measure, wins
from edgeformer.compiler.records import RecordStore
from edgeformer.compiler.search import Evolution
from edgeformer.compiler.space import Axis, Constraint, Space
from edgeformer.compiler.tuner import OutOfTime, tune

from .conftest import VERSIONS, Fake, Folder, make_problem, make_space, time_of

LONG = os.environ.get("EDGEFORMER_TORTURE") == "1"

BEST = {"rows": 8, "ahead": 4096, "place": 0}


def test_the_default_is_the_first_member_and_constraints_hold() -> None:
    space = make_space()
    members = list(space)
    assert space[0] == members[0] == space.default and len(members) == len(space) == 4 * (1 + 2 * 3)
    assert all(c["ahead"] or c["place"] == 3 for c in members)
    assert "no place" in space.refusal({"rows": 4, "ahead": 0, "place": 1})
    assert "not one of" in space.refusal({"rows": 5, "ahead": 0, "place": 3})
    assert "not one of" in space.refusal({"rows": True, "ahead": 0, "place": 3})
    assert "axes" in space.refusal({"rows": 4})
    with pytest.raises(ValueError, match="no member"):
        Space((Axis("a", (1, 2)),), (Constraint("never", lambda c: False),))


def test_a_phase_leaves_other_axes_at_their_default() -> None:
    space = Space((Axis("a", (1, 2), ("few",)), Axis("b", (1, 2), ("many",)), Axis("c", (1, 2))))
    few = space.of_phase("few")
    assert {c["b"] for c in few} == {1} and len(few) == 4 and few.signature == space.signature
    assert few.essential({"a": 2, "b": 1, "c": 1}) == {"a": 2, "c": 1}
    assert few.complete({"a": 2}) == {"a": 2, "b": 1, "c": 1}


def test_an_axis_more_is_another_space() -> None:
    assert make_space().signature != make_space((Axis("unroll", (1, 2)),)).signature


def test_draws_and_mutations_are_members() -> None:
    space, generator = make_space(), random.Random(0)
    for _ in range(200):
        drawn = space.draw(generator)
        assert not space.refusal(drawn)
        mutated = space.mutate(drawn, generator)
        assert not space.refusal(mutated) and mutated != drawn


def test_the_search_tries_every_member_of_a_small_space_once() -> None:
    search, trials = Evolution(make_space()), []
    while (found := search.propose(trials)) is not None:
        trials.append(Trial(found, GOOD, 1.0))
    seen = [json.dumps(t.configuration) for t in trials]
    assert len(seen) == len(set(seen)) == len(make_space()) - 1  # the default is timed beside each


def test_the_search_finds_the_best_of_a_large_space_in_a_few_trials() -> None:
    axes = tuple(Axis(name, tuple(range(8))) for name in "abcde")
    space, trials = Space(axes), []
    cost = lambda c: 1 + sum(abs(value - 5) for value in c.values()) / 50  # noqa: E731
    for _ in range(120):
        found = Evolution(space).propose(trials)
        assert found is not None
        trials.append(Trial(found, GOOD, cost(found) / cost(space.default)))
    best = min(trials, key=lambda t: t.ratio or 1)
    assert cost(best.configuration) <= 1.04  # two steps from the best of 32,768


def test_a_problem_is_tuned_recorded_and_then_left_alone(folder: Folder) -> None:
    fake, problem = Fake(), make_problem()
    (outcome,) = folder.tune([problem], fake)
    assert outcome.state == "tuned" and outcome.record is not None
    assert outcome.record.configuration == BEST and outcome.record.trials == outcome.trials == len(fake.tried)
    assert outcome.record.default_seconds == time_of(problem.space.default)
    tried = len(fake.tried)
    (again,) = folder.tune([problem], fake)
    assert again.state == "kept" and again.trials == 0 and again.record == outcome.record
    assert len(fake.tried) == tried
    assert [p.done for p in folder.journal.progress()] == [True]


def test_a_wrong_or_broken_candidate_never_wins(folder: Folder) -> None:
    kinds = itertools.cycle(["wrong", "crash", "hang", "memory", "build", "pruned", "error"])

    def status(configuration: Mapping[str, Any]) -> str:
        return next(kinds) if configuration["rows"] == 8 else GOOD

    (outcome,) = folder.tune([make_problem()], Fake(status))
    assert outcome.record is not None and outcome.record.configuration["rows"] != 8
    bad = [t for t in folder.journal.trials(make_problem().key) if t.status != GOOD]
    assert len(bad) == 7 and all(t.configuration["rows"] == 8 and t.ratio is None for t in bad)


def test_where_nothing_is_faster_the_default_is_recorded(folder: Folder) -> None:
    fake = Fake(seconds=lambda c: 1e-6 if c == make_space().default else 1.1e-6)
    (outcome,) = folder.tune([make_problem()], fake)
    assert outcome.record is not None and outcome.record.configuration == make_space().default
    assert folder.tune([make_problem()], fake)[0].state == "kept"


def test_a_search_that_looked_better_by_noise_does_not_win(folder: Folder) -> None:
    """In the trials one candidate had luck; timed in turn with the default it is not faster."""

    class Lucky(Fake):
        def trial(self, problem: Any, configuration: Mapping[str, Any], seconds: float = 1e9) -> Trial:
            trial = super().trial(problem, configuration)
            return Trial(trial.configuration, GOOD, 0.2, 1e-6) if configuration["rows"] == 12 else trial

    (outcome,) = folder.tune([make_problem()], Lucky(seconds=lambda c: 1e-6))
    assert outcome.record is not None and outcome.record.configuration == make_space().default


def test_an_interrupted_search_goes_on_where_it_was(folder: Folder) -> None:
    class Stopped(Fake):
        def trial(self, problem: Any, configuration: Mapping[str, Any], seconds: float = 1e9) -> Trial:
            if len(self.tried) == 7:
                raise KeyboardInterrupt
            return super().trial(problem, configuration)

    whole = Fake()
    folder.tune([make_problem("other")], whole)
    stopped, rest = Stopped(), Fake()
    with pytest.raises(KeyboardInterrupt):
        folder.tune([make_problem()], stopped)
    (progress,) = [p for p in folder.journal.progress() if p.title == "n=64"]
    assert progress.trials == 7 and not progress.done and progress.best is not None
    folder.tune([make_problem()], rest)
    assert stopped.tried + rest.tried == whole.tried


def test_the_budget_is_shared_and_what_is_left_over_passes_on(folder: Folder) -> None:
    problems = [make_problem(f"p{i}") for i in range(3)]
    outcomes = folder.tune(problems, Fake(), seconds=30.0)
    assert [o.state for o in outcomes] == ["tuned"] * 3 and sum(o.trials for o in outcomes) <= 30
    assert all(5 <= o.trials <= 12 for o in outcomes), [o.trials for o in outcomes]


def test_more_goes_on_and_a_new_winner_has_to_beat_the_record(folder: Folder) -> None:
    fake = Fake()
    (first,) = folder.tune([make_problem()], fake, most_trials=3)
    (second,) = folder.tune([make_problem()], fake, more=True)
    assert (
        second.trials == len(make_space()) - 1 - 3 and second.record is not None and first.record is not None
    )
    assert second.record.seconds <= first.record.seconds and second.record.configuration == BEST


def test_a_problem_that_another_tuner_holds_is_left_to_it(folder: Folder) -> None:
    with folder.journal.claim(make_problem().key) as mine:
        assert mine
        outcomes = folder.tune([make_problem(), make_problem("free")], Fake())
    assert [o.state for o in outcomes] == ["busy", "tuned"]


class Machine:
    """A clock and calls of known length; `slow` is a factor that may change with time."""

    def __init__(self, slow: Any = lambda now: 1.0) -> None:
        self.now, self.slow = 0.0, slow

    def clock(self) -> float:
        return self.now

    def call(self, seconds: float) -> Any:
        def run(index: int) -> None:
            self.now += seconds * self.slow(self.now)

        return run

    def probe(self) -> float:
        return 1 / self.slow(self.now)


def test_calls_are_timed_in_turn_by_the_median() -> None:
    machine = Machine()
    found = measure([machine.call(1e-3), machine.call(2e-3)], 5, clock=machine.clock)
    assert [s.seconds for s in found.samples] == pytest.approx([1e-3, 2e-3]) and found.steady
    assert wins(found.times[1], found.times[0]) and not wins(found.times[0], found.times[1])


def test_a_measurement_while_the_machine_changed_is_repeated_and_bounded() -> None:
    machine = Machine(lambda now: 1.0 if now < 0.01 or now > 0.1 else 2.0)
    found = measure([machine.call(1e-3)], 12, probe=machine.probe, clock=machine.clock, most_repeats=9)
    assert found.steady and found.repeats > 1
    wild = Machine(lambda now: 1 + int(now * 1000) % 3)
    found = measure([wild.call(1e-3)], 4, probe=wild.probe, clock=wild.clock, most_repeats=3)
    assert found.repeats <= 3


def test_slow_calls_get_fewer_passes_where_the_time_is_short() -> None:
    """A prompt of half a second, four rivals, the machine restless: 15 passes three times took minutes."""
    wild = Machine(lambda now: 1 + int(now) % 3)
    found = measure([wild.call(0.5)] * 5, 15, probe=wild.probe, clock=wild.clock, seconds=30.0)
    assert len(found.times[0]) >= 5 and found.repeats == 1 and wild.now < 60
    calm = Machine()
    found = measure([calm.call(0.5)] * 5, 15, probe=calm.probe, clock=calm.clock, seconds=1.0)
    assert [len(times) for times in found.times] == [5] * 5  # fewer would have no spread


def test_slow_then_fast_noise_makes_no_winner() -> None:
    """The machine speeds up in the middle of a comparison of two equal kernels: 100 planted moments."""
    for moment in range(100):
        machine = Machine(lambda now, at=moment / 1000: 2.0 if now < at else 1.0)
        found = measure([machine.call(1e-3), machine.call(1e-3)], 15, clock=machine.clock)
        assert not wins(found.times[0], found.times[1]), moment


def test_a_winner_beats_the_old_one_by_more_than_the_spread() -> None:
    generator = random.Random(0)
    noise = lambda: 1 + generator.gauss(0, 0.05)  # noqa: E731
    equal = sum(wins([noise() for _ in range(15)], [noise() for _ in range(15)]) for _ in range(400))
    better = sum(wins([noise() for _ in range(15)], [0.85 * noise() for _ in range(15)]) for _ in range(400))
    assert equal <= 20 and better >= 396


def test_a_sample_is_the_median_with_half_the_middle_range() -> None:
    assert Sample.of([5, 1, 2, 3, 4, 6, 7, 100]) == Sample(4.5, 1.5, 8)
    assert Measured((Sample(1, 0, 1),), ((1.0,),), 0.11, 1).steady is False


def test_more_without_anything_new_keeps_the_record(folder: Folder) -> None:
    fake = Fake()
    (first,) = folder.tune([make_problem()], fake)
    fake.compare = None  # pyright: ignore  nothing may be timed
    (again,) = folder.tune([make_problem()], fake, more=True)
    assert (again.state, again.trials, again.record) == ("kept", 0, first.record)


def test_the_best_so_far_is_settled_without_a_trial(folder: Folder) -> None:
    """What was searched while the machine was busy is timed again, and a record made of it."""
    misled = Fake(seconds=lambda c: 1e-6 if c == make_space().default else 1.1e-6)
    folder.tune([make_problem()], misled)
    settled = Fake(seconds=lambda c: 1e-6 if c["rows"] == 12 else 1.1e-6)
    (outcome,) = folder.tune([make_problem()], settled, more=True, most_trials=0)
    assert settled.tried == [] and outcome.record is not None
    assert outcome.record.seconds == 1e-6 or outcome.record.configuration == make_space().default


class Slow(Fake):
    """Builds take 40 s of its clock each, in an earlier run's configurations too; none may pass its limit."""

    def trial(self, problem: Any, configuration: Mapping[str, Any], seconds: float = 1e9) -> Trial:
        if seconds < 40:
            self.now += seconds
            raise OutOfTime(f"{problem.title}: over")
        self.clock_step = 40.0
        return super().trial(problem, configuration, seconds)

    def compare(self, problem: Any, configurations: Any, passes: int, seconds: float = 1e9) -> Measured:
        missing = [c for c in configurations[1:] if c not in self.tried]
        if 40 * len(missing) > seconds:
            self.now += seconds
            raise OutOfTime("over")
        self.now += 40 * len(missing)
        return super().compare(problem, configurations, passes, seconds)


@pytest.mark.parametrize("seconds", [10.0, 45.0, 100.0, 300.0])
def test_a_budget_holds_however_long_a_build_takes(folder: Folder, seconds: float) -> None:
    """Also where a later run has to build again what it compares, which once took four times the budget."""
    for _ in range(3):
        slow = Slow()
        outcomes = folder.tune([make_problem("a"), make_problem("b")], slow, seconds=seconds, more=True)
        assert slow.now <= 1.25 * seconds + 10, (slow.now, outcomes)
        assert all(o.state in ("tuned", "stopped", "kept") for o in outcomes)
        assert not any(o.note.startswith(o.problem.title) for o in outcomes)
    held = sum(p.trials for p in folder.journal.progress())
    assert held or seconds < 100


def test_slow_then_fast_noise_makes_no_record() -> None:
    """The machine's speed changes at a planted moment of the whole loop: equal kernels, the default stays."""
    import tempfile

    for moment in range(0, 4000, 40 if LONG else 1000):
        for fast, slow in ((1.0, 2.0), (2.0, 1.0)):
            machine = Machine(lambda now, at=moment / 1000, a=slow, b=fast: a if now < at else b)
            evaluator = Timed(machine)
            with tempfile.TemporaryDirectory() as name:
                root = Path(name)
                journal, records = Journal(root), RecordStore(root, shipped=root / "none")
                (outcome,) = tune(
                    [make_problem()], evaluator, records, journal, seconds=1e3, versions=VERSIONS,
                    clock=machine.clock,
                )  # fmt: skip
                journal.close()
            assert outcome.record is not None
            assert outcome.record.configuration == make_space().default, (moment, fast, slow)


class Timed:
    """An evaluator of equal kernels on a machine whose speed changes: trials and comparisons are measured."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def trial(self, problem: Any, configuration: Mapping[str, Any], seconds: float = 1e9) -> Trial:
        found = self.compare(problem, [problem.space.default, configuration], 7)
        status = GOOD if found.steady else NOISY
        ratio = found.samples[1].seconds / found.samples[0].seconds
        return Trial(dict(configuration), status, ratio, found.samples[1].seconds)

    def compare(self, problem: Any, configurations: Any, passes: int, seconds: float = 1e9) -> Measured:
        calls = [self.machine.call(1e-3) for _ in configurations]
        return measure(calls, passes, probe=self.machine.probe, clock=self.machine.clock)
