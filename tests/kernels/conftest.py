"""What the tests of all kernels may use."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch
from torch import Tensor


class GuardedMemory:
    """Memory that ends at a page which may not be touched."""

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []

    def copy(self, x: Tensor) -> Tensor:
        """Return a copy of contiguous `x` whose last byte is the last readable one."""
        nbytes = x.numel() * x.element_size()
        pages = -(-nbytes // mmap.PAGESIZE)
        area = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        self._maps.append(area)
        address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        guard = ctypes.c_void_p(address + pages * mmap.PAGESIZE)
        assert ctypes.CDLL(None, use_errno=True).mprotect(guard, mmap.PAGESIZE, 0) == 0
        start = pages * mmap.PAGESIZE - nbytes
        raw = torch.frombuffer(area, dtype=torch.uint8, count=nbytes, offset=start)
        return raw.view(x.dtype).view(x.shape).copy_(x)


@pytest.fixture
def guarded_memory() -> GuardedMemory:
    """Memory with a guard page behind it."""
    return GuardedMemory()
