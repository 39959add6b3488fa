"""Ratios of two engines from turns side by side, and how well they are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CONFIDENCE = 0.95
DRAWS = 4000
MOVED = 0.10  # a pair does not count when the probe behind it differs by more from the one before it,
OTHERS = 0.30  # or when other programs kept more cores busy meanwhile
FEWEST = 3  # steady pairs; with fewer all count


@dataclass(frozen=True)
class Pair:
    """Seconds of one test: a peer's turn, and the mean of ours before and behind it.

    `moved` is how far the probes before and behind differ, as a part of the faster one; `others` are the
    cores that other programs kept busy meanwhile.
    """

    ours: float
    theirs: float
    moved: float = 0.0
    others: float = 0.0

    @property
    def ratio(self) -> float:
        """Our speed over theirs."""
        return self.theirs / self.ours

    @property
    def steady(self) -> bool:
        """Whether the machine kept its speed and was ours."""
        return self.moved <= MOVED and self.others <= OTHERS


@dataclass(frozen=True)
class Estimate:
    """A median and the bounds of its 95% interval (bootstrap); `dropped` samples did not count."""

    middle: float
    low: float
    high: float
    count: int
    dropped: int = 0

    @property
    def half_width(self) -> float:
        """Half of the interval over the median."""
        return (self.high - self.low) / 2 / self.middle


def medians(samples: Sequence[float], seed: int = 0, draws: int = DRAWS) -> Any:
    """Return the medians of resampled samples, float [draws]; the same draws for the same seed.

    Whole blocks of neighbours are drawn (moving-block bootstrap, Kuensch 1989): neighbouring pairs share one
    of our turns, and what disturbs a machine lasts longer than a pair.
    """
    import numpy as np

    values, count = np.asarray(samples, dtype=float), len(samples)
    length = min(count, max(2, round(count ** (1 / 3))))
    starts = np.random.default_rng(seed).integers(0, count, (draws, -(-count // length)))
    drawn = (starts[:, :, None] + np.arange(length)).reshape(draws, -1)[:, :count] % count
    return np.median(values[drawn], axis=1)


def estimate(samples: Sequence[float], dropped: int = 0) -> Estimate:
    """Return the median of samples with its interval."""
    import numpy as np

    low, high = bounds(medians(samples))
    return Estimate(float(np.median(samples)), low, high, len(samples), dropped)


def bounds(drawn: Any) -> tuple[float, float]:
    """Return the bounds of the middle 95% of drawn values."""
    import numpy as np

    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def counting(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the steady pairs; all of them where too few are."""
    steady = [pair for pair in pairs if pair.steady]
    return steady if len(steady) >= FEWEST else list(pairs)


def ratio_of(pairs: Sequence[Pair]) -> Estimate | None:
    """Return our speed over a peer's, None without pairs."""
    if not pairs:
        return None
    found = counting(pairs)
    return estimate([pair.ratio for pair in found], len(pairs) - len(found))


def moved(before: dict[str, float], after: dict[str, float], names: Sequence[str] = ()) -> float:
    """Return how far two probes differ in the speed that changed most, as a part of the faster one.

    Of the speeds in `names`, where a probe has any of them; else of all.
    """
    asked = [name for name in before if name in names] or list(before)
    return max(1 - min(before[k], after[k]) / max(before[k], after[k]) for k in asked)
