"""Memory for weights: aligned to cache lines, in large pages where the system has them. Needs no TVM."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

import torch

LARGE_PAGE = 2 << 20
_SLAB = 32 << 20
_MADV_HUGEPAGE = 14


def aligned_empty(nbytes: int, alignment: int = 64) -> torch.Tensor:
    """Return an uninitialised uint8 tensor whose first byte is on a multiple of `alignment`."""
    raw = torch.empty(nbytes + alignment, dtype=torch.uint8)
    start = -raw.data_ptr() % alignment
    return raw[start : start + nbytes]


def large_page_empty(nbytes: int) -> torch.Tensor:
    """Return an uninitialised uint8 tensor in large pages, if the system gives them (Linux: madvise)."""
    memory = aligned_empty(-(-nbytes // LARGE_PAGE) * LARGE_PAGE, LARGE_PAGE)
    advise = _madvise()
    if advise is not None:  # advice: where it is refused, small pages serve
        advise(memory.data_ptr(), memory.numel(), _MADV_HUGEPAGE)
    return memory[:nbytes]


class Arena:
    """Hands out pieces of large-page slabs; a slab lives as long as one of its pieces.

    Weights that are read once a step miss the address cache on every small page; a large page a weight
    would waste most of it.
    """

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, nbytes: int) -> torch.Tensor:
        """Return `nbytes` uninitialised bytes on a 64-byte line."""
        size = -(-nbytes // 64) * 64
        if size > self._slab.numel() - self._used:
            if size > _SLAB // 4:
                return large_page_empty(nbytes)
            self._slab, self._used = large_page_empty(_SLAB), 0
        piece = self._slab[self._used : self._used + nbytes]
        self._used += size
        return piece


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
