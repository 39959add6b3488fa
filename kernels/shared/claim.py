"""Work that threads take piece by piece, so that a slower core (little, or shared with others) gets less."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from . import tir
from .tir import T

_TEXT = """
define linkonce_odr i64 @ef_claim(ptr %counter) alwaysinline {
  %old = atomicrmw add ptr %counter, i64 1 monotonic, align 8
  ret i64 %old
}"""


@contextlib.contextmanager
def claimed(address: Any, total: Any) -> Iterator[Any]:
    """Emit a loop in one thread of a launch over pieces of [0, total), each of which one thread gets.

    `address` (int64) is a counter that was `reset` before the launch. Which thread does a piece must not
    change its result.
    """
    counter = tir.buffer_at(address, "int64")
    piece = tir.Register("int64", 1)
    claim = lambda: T.call_extern("int64", "ef_claim", T.address_of(counter[T.int64(0)]))  # noqa: E731
    with tir.import_llvm(_TEXT):
        piece.set(claim())
        with T.While(piece.get() < total):
            yield tir.let(piece.get())
            piece.set(claim())


def reset(address: Any) -> None:
    """Emit: all pieces are to be had again."""
    tir.store(tir.buffer_at(address, "int64"), 0, T.int64(0))
