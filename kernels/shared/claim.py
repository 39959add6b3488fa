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


# A thread's own range as one word: front in the high half, back in the low, both above _BIAS so that a back
# which thieves lower too far borrows nothing. Owners take from the front, thieves from the back; one atomic
# addition does either, and who saw front < back has the piece.
_BIAS = 1 << 20
_TAKE = """
define linkonce_odr i64 @ef_take(ptr %ranges, i64 %stride, i64 %me, i64 %n) noinline {
entry:
  %at = mul i64 %stride, %me
  %mine = getelementptr i8, ptr %ranges, i64 %at
  %old = atomicrmw add ptr %mine, i64 4294967296 monotonic, align 8
  %front = lshr i64 %old, 32
  %back = and i64 %old, 4294967295
  %has = icmp ult i64 %front, %back
  br i1 %has, label %own, label %next
own:
  %piece = sub i64 %front, @BIAS@
  ret i64 %piece
next:
  %j = phi i64 [ 1, %entry ], [ %j1, %look ], [ %j1, %try ]
  %j1 = add i64 %j, 1
  %more = icmp ult i64 %j, %n
  br i1 %more, label %look, label %none
look:
  %sum = add i64 %me, %j
  %victim = urem i64 %sum, %n
  %there = mul i64 %stride, %victim
  %theirs = getelementptr i8, ptr %ranges, i64 %there
  %seen = load atomic i64, ptr %theirs monotonic, align 8
  %seen_front = lshr i64 %seen, 32
  %seen_back = and i64 %seen, 4294967295
  %left = icmp ult i64 %seen_front, %seen_back
  br i1 %left, label %try, label %next
try:
  %before = atomicrmw sub ptr %theirs, i64 1 monotonic, align 8
  %before_front = lshr i64 %before, 32
  %before_back = and i64 %before, 4294967295
  %got = icmp ult i64 %before_front, %before_back
  br i1 %got, label %stolen, label %next
stolen:
  %above = sub i64 %before_back, @ABOVE@
  ret i64 %above
none:
  ret i64 -1
}""".replace("@BIAS@", str(_BIAS)).replace("@ABOVE@", str(_BIAS + 1))


def offer(address: Any, first: Any, last: Any) -> None:
    """Emit: pieces [first, last) are this thread's, for `taken` behind the next barrier."""
    word = T.shift_left(first + _BIAS, T.int64(32)) + (last + _BIAS)
    tir.store(tir.buffer_at(address, "int64"), 0, word)


@contextlib.contextmanager
def taken(ranges: Any, stride: Any, thread: Any, threads: Any) -> Iterator[Any]:
    """Emit a loop in one thread of a launch over its own pieces, in order, then over what others have left.

    `ranges` (int64 address) + thread * `stride` is where each thread has made its offer.
    """
    first = tir.buffer_at(ranges, "int64")
    piece = tir.Register("int64", 1)

    def take() -> Any:
        where = T.address_of(first[T.int64(0)])
        apart = T.int64(stride) if isinstance(stride, int) else stride  # a bare int would be an int32
        return T.call_extern("int64", "ef_take", where, apart, thread, threads)

    with tir.import_llvm(_TAKE):
        piece.set(take())
        with T.While(piece.get() >= T.int64(0)):
            yield tir.let(piece.get())
            piece.set(take())


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
