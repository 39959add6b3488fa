"""Does ours win? Two modules on the same input, interleaved, at few rows and at many."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

# Rows that a layer serves: one token and a prompt, as for layouts; without decoding, a sentence and a batch.
DECODING, ENCODING = (1, 128), (32, 1024)
_WEIGHTS = {DECODING: (0.6, 0.4), ENCODING: (0.3, 0.7)}
_SECONDS = 0.02  # a side and size
_MOST = 60


@torch.inference_mode()
def gains(
    old: nn.Module, new: nn.Module, columns: int, dtype: torch.dtype, sizes: tuple[int, int] = DECODING
) -> tuple[float, float]:
    """Return how many times faster `new` is than `old`, at each number of rows of `columns` inputs."""
    found = []
    for rows in sizes:
        x = torch.randn(rows, columns).to(dtype)
        found.append(ratio(lambda x=x: old(x), lambda x=x: new(x)))
    return found[0], found[1]


def ratio(old: Callable[[], Tensor], new: Callable[[], Tensor]) -> float:
    """Return the least time of `old` / that of `new`, called in turn after a warm-up.

    The least, not the median: whatever else runs on the machine while a model is optimised slows one side or
    the other, and the choice stays.
    """
    for _ in range(2):
        old()
        new()
    times: tuple[list[float], list[float]] = ([], [])
    until = time.perf_counter() + 2 * _SECONDS
    while len(times[0]) < 5 or (time.perf_counter() < until and len(times[0]) < _MOST):
        for side, call in enumerate((old, new)):
            start = time.perf_counter()
            call()
            times[side].append(time.perf_counter() - start)
    return min(times[0]) / min(times[1])


def wins(gain: tuple[float, float], sizes: tuple[int, int] = DECODING) -> bool:
    """Whether the weighted geometric mean of both gains is at least one."""
    return sum(w * math.log(g) for w, g in zip(_WEIGHTS[sizes], gain)) >= 0
