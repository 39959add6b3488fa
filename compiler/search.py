"""Which configuration to try next: a short evolutionary loop over a Space."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from .journal import GOOD, Trial
from .space import Space

SMALL = 48  # members up to which a space is tried whole, in random order
_FIRST = 10  # random members before the best are mutated
_PARENTS = 5
_FRESH = 0.15  # part of the later proposals that are random


class Evolution:
    """Proposes members of `space` that were not tried, given the trials so far.

    After some random members it mutates one of the best, by one step of one or two axes, mostly. The order
    depends on `seed` and the trials alone, so a search that was interrupted goes on as it would have.
    """

    def __init__(self, space: Space, seed: int = 0) -> None:
        self.space, self.seed = space, seed
        self._all = _few(space)

    def propose(self, trials: Sequence[Trial]) -> dict[str, Any] | None:
        """Return the next configuration, or None when every member was tried."""
        tried = {_key(trial.configuration) for trial in trials}
        tried.add(_key(self.space.default))  # the measure of all others, timed beside each
        generator = random.Random(f"{self.seed} {len(trials)}")
        if self._all is not None:
            left = [found for found in self._all if _key(found) not in tried]
            return generator.choice(left) if left else None
        good = sorted(
            (t for t in trials if t.status == GOOD and t.ratio is not None), key=lambda t: t.ratio or 0
        )
        parents = [self.space.default, *(t.configuration for t in good[:_PARENTS])]
        for attempt in range(200):
            random_one = len(trials) < _FIRST or generator.random() < _FRESH or attempt > 50
            if random_one:
                found = self.space.draw(generator)
            else:  # the better, the likelier
                parent = parents[min(int(generator.expovariate(0.7)) + (len(parents) > 1), len(parents) - 1)]
                found = self.space.mutate(parent, generator)
            if _key(found) not in tried:
                return found
        return None


def _few(space: Space) -> list[dict[str, Any]] | None:
    """Return every member of a small space, else None."""
    found = []
    for configuration in space:
        found.append(configuration)
        if len(found) > SMALL:
            return None
    return found


def _key(configuration: Mapping[str, Any]) -> str:
    return json.dumps(dict(configuration), sort_keys=True)
