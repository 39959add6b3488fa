"""Scratch memory for kernels: one growing buffer a Python thread, valid until the next call."""

from __future__ import annotations

import threading

import torch

COUNTER_BYTES = 64  # a counter of claimed work has a cache line of its own


class _Local(threading.local):
    """A thread's scratch: `size` bytes at `address`. Another thread may get the address of one that ended."""

    address, size = 0, -1
    buffer: torch.Tensor | None = None


local = _Local()


def scratch(nbytes: int) -> int:
    """Return the 64-byte aligned address of at least `nbytes` bytes; contents are arbitrary."""
    return local.address if nbytes <= local.size else _grow(nbytes)


def _grow(nbytes: int) -> int:
    size = max(nbytes, 1 << 20)
    with torch.inference_mode(False):  # it outlives the caller's mode
        held = torch.empty(size + 64, dtype=torch.uint8)
    address = held.data_ptr() + (-held.data_ptr() % 64)
    local.buffer, local.address, local.size = held, address, size
    return address


def scratch_bytes() -> int:
    """Return the bytes that this thread's scratch holds."""
    return 0 if local.buffer is None else local.buffer.numel()
