"""Scratch memory for kernels: one growing buffer a Python thread, valid until the next call."""

from __future__ import annotations

import threading

import torch

COUNTER_BYTES = 64  # a counter of claimed work has a cache line of its own

_local = threading.local()


def scratch(nbytes: int) -> int:
    """Return the 64-byte aligned address of at least `nbytes` bytes; contents are arbitrary."""
    address, size = getattr(_local, "place", (0, -1))
    return address if nbytes <= size else _grow(nbytes)


def _grow(nbytes: int) -> int:
    size = max(nbytes, 1 << 20)
    with torch.inference_mode(False):  # it outlives the caller's mode
        held = torch.empty(size + 64, dtype=torch.uint8)
    address = held.data_ptr() + (-held.data_ptr() % 64)
    _local.buffer, _local.place = held, (address, size)
    return address


def scratch_bytes() -> int:
    """Return the bytes that this thread's scratch holds."""
    held: torch.Tensor | None = getattr(_local, "buffer", None)
    return 0 if held is None else held.numel()
