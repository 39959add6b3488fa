"""Scratch memory for kernels: one growing buffer a Python thread, valid until the next call."""

from __future__ import annotations

import threading

import torch

COUNTER_BYTES = 64  # a counter of claimed work has a cache line of its own

_local = threading.local()


def scratch(nbytes: int) -> int:
    """Return the 64-byte aligned address of at least `nbytes` bytes; contents are arbitrary."""
    held: torch.Tensor | None = getattr(_local, "buffer", None)
    if held is None or held.numel() < nbytes + 64:
        with torch.inference_mode(False):  # it outlives the caller's mode
            held = torch.empty(max(nbytes + 64, 1 << 20), dtype=torch.uint8)
        _local.buffer = held
    address = held.data_ptr()
    return address + (-address % 64)


def scratch_bytes() -> int:
    """Return the bytes that this thread's scratch holds."""
    held: torch.Tensor | None = getattr(_local, "buffer", None)
    return 0 if held is None else held.numel()
