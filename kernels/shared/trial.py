"""What tuning trials of several operators share: poisoned memory, and inputs that outgrow the caches."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from . import scratch
from .memory import large_page_empty

_MOST_COPIES = 4096
_CALLS, _SHORT_SECONDS = 3, 0.005  # of one check
_Result = TypeVar("_Result")


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Let new tensors and scratch memory start as NaN (all ones), so that what is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    held = scratch.local.buffer
    if held is not None:
        held.fill_(255)
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def results(call: Callable[[], _Result]) -> Iterator[_Result]:
    """Yield what `call` returns on poisoned memory; of a short one several times.

    Threads that get in each other's way do so by chance, and not while one of them waits for a core.
    """
    for _ in range(_CALLS):
        start = time.perf_counter()
        with poisoned():
            found = call()
        elapsed = time.perf_counter() - start
        yield found
        if elapsed > _SHORT_SECONDS:
            return


class Copies:
    """Copies of some bytes, one behind another in large pages, together `least` bytes (at least one copy)."""

    def __init__(self, nbytes: int, least: int) -> None:
        self.nbytes = -(-nbytes // 4096) * 4096  # copies start on pages of their own, as weights do
        self.count = max(1, min(_MOST_COPIES, -(-least // self.nbytes)))
        self.memory = large_page_empty(self.count * self.nbytes)

    def fill(self, source: torch.Tensor) -> None:
        """Write `source` (uint8) to every copy."""
        for i in range(self.count):
            self.view(i)[: source.numel()] = source

    def view(self, index: int) -> torch.Tensor:
        """Return the bytes of one copy."""
        at = index % self.count * self.nbytes
        return self.memory[at : at + self.nbytes]

    @property
    def area(self) -> tuple[int, int]:
        """Address and bytes of all copies."""
        return self.memory.data_ptr(), self.memory.numel()
