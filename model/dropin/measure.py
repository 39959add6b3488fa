"""Does ours win? Two modules on the same input, interleaved, at one row and at many."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

ROWS = (1, 128)
_WEIGHTS = (0.6, 0.4)  # of decode and prefill, as for layouts
_SECONDS = 0.02  # a side and size
_MOST = 60


@torch.inference_mode()
def gains(old: nn.Module, new: nn.Module, columns: int, dtype: torch.dtype) -> tuple[float, float]:
    """Return how many times faster `new` is than `old`, at 1 and at 128 rows of `columns` inputs."""
    found = []
    for rows in ROWS:
        x = torch.randn(rows, columns).to(dtype)
        found.append(ratio(lambda x=x: old(x), lambda x=x: new(x)))
    return found[0], found[1]


def ratio(old: Callable[[], Tensor], new: Callable[[], Tensor]) -> float:
    """Return median time of `old` / median time of `new`, called in turn after a warm-up."""
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
    return statistics.median(times[0]) / statistics.median(times[1])


def wins(gain: tuple[float, float]) -> bool:
    """Whether the weighted geometric mean of both gains is at least one."""
    return sum(w * math.log(g) for w, g in zip(_WEIGHTS, gain)) >= 0
