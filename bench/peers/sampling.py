"""What peers that give logits have in common: random prompts, greedy queries."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def random_ids(vocabulary: int, batch: int, count: int) -> Any:
    """Return random token ids int64 [batch, count], the same for the same count."""
    import numpy as np

    return np.random.default_rng(count).integers(0, vocabulary, (batch, count), dtype=np.int64)


def greedy(step: Callable[[Any, int], Any], ids: Any, generate: int) -> tuple[float, float]:
    """Continue ids [batch, tokens] greedily; return the seconds to the first tokens and to the last.

    `step(ids, position)` gives logits [batch, vocabulary] of the last token.
    """
    start = time.perf_counter()
    tokens = step(ids, 0).argmax(-1)
    first = time.perf_counter() - start
    for i in range(generate - 1):
        tokens = step(tokens[:, None], ids.shape[1] + i).argmax(-1)
    return first, time.perf_counter() - start
