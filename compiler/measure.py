"""The one timer: warm-up, passes over rotating inputs, interleaved candidates, median and spread."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Clock = Callable[[], float]
MOVED = 0.10  # a probe that moves by more than this makes a measurement worthless
LEAST_PASSES = 5
# Bytes that rotate, in last-level caches. One that replaces at random still answers for a part h of a walk in
# circles over c times itself, h = exp(-c (1 - h)): 76% at 1.15, 20% at 2, 2% at 4.
EVICTING = 4
_LEAST_SECONDS = 0.002  # of a pass: far above the clock's step and a launch's jitter


@dataclass(frozen=True)
class Sample:
    """Seconds of one call: the median of the passes, and half of the range of their middle half."""

    seconds: float
    spread: float
    passes: int

    @staticmethod
    def of(times: Sequence[float]) -> Sample:
        """Return the sample of the seconds a call took in each pass."""
        ordered = sorted(times)
        quarter = len(ordered) // 4
        low, high = ordered[quarter], ordered[-1 - quarter]
        return Sample(statistics.median(ordered), (high - low) / 2, len(ordered))


@dataclass(frozen=True)
class Measured:
    """Samples of interleaved calls; `moved` is how far the probe went, as a fraction; `repeats` of it all."""

    samples: tuple[Sample, ...]
    times: tuple[tuple[float, ...], ...]
    moved: float
    repeats: int

    @property
    def steady(self) -> bool:
        """Whether the machine's speed stayed within MOVED."""
        return self.moved <= MOVED


Call = Callable[[int], object]  # takes a running number, which chooses the copy of the inputs


def measure(
    calls: Sequence[Call],
    passes: int,
    *,
    probe: Callable[[], float] | None = None,
    most_repeats: int = 3,
    clock: Clock = time.perf_counter,
    least_seconds: float = _LEAST_SECONDS,
    most_calls: int = 1 << 14,
    seconds: float = math.inf,
) -> Measured:
    """Time `calls` in turn, `passes` times; repeat it all while the `probe` moves by more than MOVED.

    After `most_repeats` the steadiest attempt is returned: `steady` then says that it is not. After `seconds`
    no pass begins, but for the first LEAST_PASSES.
    """
    end = clock() + seconds if math.isfinite(seconds) else math.inf
    late = lambda: math.isfinite(end) and clock() >= end  # noqa: E731
    counter = 0
    counts = []
    for call in calls:  # warm-up: code and pages come in, threads awake; and how many calls make a pass
        start = clock()
        call(counter)
        elapsed = max(clock() - start, 1e-9)
        if elapsed < least_seconds:  # the first call was slow: count by a second one
            start = clock()
            call(counter + 1)
            elapsed = max(clock() - start, 1e-9)
        counts.append(max(1, min(most_calls, round(least_seconds / elapsed))))
        counter += 2
    best: Measured | None = None
    attempt = 0
    for attempt in range(1, most_repeats + 1):
        before = probe() if probe else 1.0
        times: list[list[float]] = [[] for _ in calls]
        for done in range(passes):
            if done >= LEAST_PASSES and late():
                break
            for which, call in enumerate(calls):
                start = clock()
                for _ in range(counts[which]):
                    call(counter)
                    counter += 1
                times[which].append((clock() - start) / counts[which])
        after = probe() if probe else 1.0
        moved = abs(after - before) / max(min(after, before), 1e-12)
        found = Measured(tuple(Sample.of(t) for t in times), tuple(tuple(t) for t in times), moved, attempt)
        if best is None or found.moved < best.moved:
            best = found
        if best.steady or late():
            break
    assert best is not None
    return Measured(best.samples, best.times, best.moved, attempt)


def wins(old: Sequence[float], new: Sequence[float]) -> bool:
    """Whether `new` beats `old` by more than the spread; both were timed in turn, pass by pass.

    The median of the differences of neighbours must exceed half the range of their middle half, and the
    spread of either.
    """
    differences = Sample.of([a - b for a, b in zip(old, new)])
    spread = max(differences.spread, min(Sample.of(old).spread, Sample.of(new).spread))
    return differences.seconds > spread and differences.seconds > 0
