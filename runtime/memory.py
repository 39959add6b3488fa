"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
import functools
from typing import Any


@functools.cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim  # glibc; elsewhere freed pages go back by themselves, or stay
    except (OSError, AttributeError, TypeError):
        return None


def give_back() -> None:
    """Return freed pages to the system: glibc keeps what large tensors leave, up to all that they took."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
