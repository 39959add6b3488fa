"""Engines take turns, each peer's between two of ours, so that what slows the machine down slows both.

A turn is one run of a test, or as many as fill half a second. A pair is one turn of a peer beside the mean
of ours before and behind it: a steady drift cancels. The machine's limits are probed before and behind each
pair; one during which those that matter moved, or other programs worked, does not count and is measured
again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from .check import Load
from .child import Timing
from .fleet import OURS, Fleet, Problem
from .paired import Pair, estimate, moved, ratio_of
from .work import Test

PAUSE = 0.05  # seconds between engines: idle threads of one go to sleep before the other starts
TURN = 0.5  # seconds: shorter tests are repeated within a turn
LEAST_ROUNDS = 5
MOST_ROUNDS = 100
AIM = 0.015  # half of the interval over the ratio: then there are pairs enough
# What a test waits for: a decode step for memory, whatever a matrix unit does meanwhile; prefill for any.
MATTERS = {"tg": ("memory", "float")}

Probe = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Rounds:
    """How many rounds a test gets.

    `repeats` steady ones, disturbed ones repeated once; or, where that is None, as many as it takes to know
    each ratio to AIM (without a peer: our speed), but no more than `seconds` allow.
    """

    repeats: int | None
    seconds: float

    def enough(self, rounds: int, steady: int, known: bool, seconds: float) -> bool:
        """Return whether `rounds` are enough, of which `steady` count for every peer."""
        if self.repeats is not None:
            return steady >= self.repeats or rounds >= 2 * self.repeats
        if rounds >= MOST_ROUNDS or (rounds >= LEAST_ROUNDS and seconds > self.seconds):
            return True
        return steady >= LEAST_ROUNDS and known


@dataclass
class Turns:
    """One test of all engines. `found` has, for each engine, what the journal keeps of it.

    Its `probes` are the limits before and behind each of its turns, as (before, behind).
    """

    fleet: Fleet
    test: Test
    probe: Probe
    load: Callable[[], Load]
    progress: Callable[[str], None]
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    last: float | None = None  # seconds of our turn just before
    before: dict[str, float] | None = None  # the last probe
    open: list[str] = field(default_factory=list)  # engines that had a turn since

    def measure(self, rounds: Rounds) -> dict[str, dict[str, Any]]:
        """Warm every engine up, then let them take turns until there is enough of it."""
        self.progress(f"{self.test.name}: warm-up")
        for name in self.fleet.names:
            settled = self.fleet.attempt(name, lambda engine: engine.prepare(self.test))
            self.found[name] = problem_of(settled) if isinstance(settled, Problem) else {"settled": settled}
            self.found[name] |= {"seconds": [], "joules": [], "probes": []}
            self.found[name] |= {} if name == OURS else {"pairs": []}
        start, done = time.monotonic(), 0
        while self._running(self.fleet.names):
            seconds = time.monotonic() - start
            if rounds.enough(done, self._steady(done), self._known(), seconds):
                break
            done += 1
            self.progress(f"{self.test.name}: round {done}")
            self._round(done)
        return self.found

    def _running(self, names: tuple[str, ...]) -> list[str]:
        return [name for name in names if "problem" not in self.found[name]]

    def _peers(self) -> list[str]:
        return self._running(self.fleet.names[1:])

    def _steady(self, rounds: int) -> int:
        """Return the fewest pairs of a peer that count; the rounds where there are no pairs."""
        pairs = [_pairs(self.found[name]) for name in self._peers()] if self._running((OURS,)) else []
        return min((sum(p.steady for p in found) for found in pairs), default=rounds)

    def _known(self) -> bool:
        """Return whether every ratio, or our speed where there is no peer, is known to AIM."""
        found = [ratio_of(_pairs(self.found[name])) for name in self._peers()]
        known = [e for e in found if e is not None]
        alone = self.found[OURS]["seconds"]
        if not known and alone:
            known = [estimate(alone)]
        return all(e.half_width <= AIM for e in known)

    def _round(self, number: int) -> None:
        """Let each peer have a turn between two of ours; the peer that begins changes."""
        peers = self._peers()
        if self.before is None:
            self._probe()
        if self.last is None or not peers:
            self.last = self._turn(OURS)
            self._probe()
        for i in range(len(peers)):
            name = peers[(i + number) % len(peers)]
            load = self.load()
            theirs, again = self._turn(name), self._turn(OURS)
            others = self.load().others_since(load)
            change = moved(*self._probe(), MATTERS.get(self.test.kind, ()))
            if self.last and theirs and again:
                pair = Pair((self.last + again) / 2, theirs, round(change, 4), round(others, 3))
                self.found[name]["pairs"].append(asdict(pair))
            self.last = again

    def _probe(self) -> tuple[dict[str, float], dict[str, float]]:
        """Probe the limits, behind the turns since the last time; return the last probe and this one."""
        time.sleep(PAUSE)
        after = {name: float(f"{speed:.5g}") for name, speed in self.probe().items()}
        before, self.before = self.before or after, after
        for name in self.open:
            self.found[name]["probes"].append([before, after])
        self.open.clear()
        return before, after

    def _turn(self, name: str) -> float | None:
        """Return the mean seconds of a test in an engine's turn; None where it has a problem."""
        if not self._running((name,)):
            return None
        time.sleep(PAUSE)
        timings: list[Timing] = []
        start = time.monotonic()
        while not timings or max(sum(t.seconds for t in timings), time.monotonic() - start) < TURN:
            timing = self.fleet.attempt(name, lambda engine: engine.run(self.test))
            if isinstance(timing, Problem):
                self.found[name] |= problem_of(timing)
                return None
            timings.append(timing)
        joules = [t.joules for t in timings if t.joules is not None]
        seconds = sum(t.seconds for t in timings) / len(timings)
        self.found[name]["seconds"].append(seconds)
        self.found[name]["joules"].append(sum(joules) / len(joules) if joules else None)
        self.open.append(name)
        return seconds


def _pairs(found: dict[str, Any]) -> list[Pair]:
    return [Pair(**pair) for pair in found["pairs"]]


def problem_of(problem: Problem) -> dict[str, Any]:
    """Return what the journal keeps of a problem."""
    return {"problem": asdict(problem)}
