"""A barrier between the threads of one launch, as LLVM IR: spin, then give the core away."""

from __future__ import annotations

from typing import Any

from . import tir
from .tir import T

CLAIMS = 64  # where the counter of claimed work stands (see claim.py); it is 0 behind every barrier

# 256 bytes: thread count at +0, claims at +64, generation at +128, on lines of their own. A thread that has
# spun long enough yields: on a machine with more runnable threads than cores the one that is waited for may
# not be running.
_TEXT = r"""
declare i32 @sched_yield()
@PAUSE_DECLARATION@
define linkonce_odr i32 @ef_barrier(ptr %b, i64 %n) noinline {
entry:
  %flag = getelementptr i8, ptr %b, i64 128
  %generation = load atomic i32, ptr %flag acquire, align 4
  %old = atomicrmw add ptr %b, i32 1 acq_rel
  %n32 = trunc i64 %n to i32
  %last = sub i32 %n32, 1
  %is_last = icmp eq i32 %old, %last
  br i1 %is_last, label %release, label %spin
release:
  store atomic i32 0, ptr %b monotonic, align 4
  %claims = getelementptr i8, ptr %b, i64 64
  store atomic i64 0, ptr %claims monotonic, align 8
  %next = add i32 %generation, 1
  store atomic i32 %next, ptr %flag release, align 4
  ret i32 0
spin:
  %count = phi i32 [ 0, %entry ], [ %count1, %again ]
  %now = load atomic i32, ptr %flag acquire, align 4
  %open = icmp ne i32 %now, %generation
  br i1 %open, label %done, label %more
more:
  %count1 = add i32 %count, 1
  %long = icmp ugt i32 %count1, 20000
  br i1 %long, label %yield, label %again
yield:
  %ignored = call i32 @sched_yield()
  br label %again
again:
  @PAUSE@
  br label %spin
done:
  ret i32 0
}"""


_PAUSE = {
    "x86_64": ("declare void @llvm.x86.sse2.pause()", "call void @llvm.x86.sse2.pause()"),
    "aarch64": ("declare void @llvm.aarch64.hint(i32)", "call void @llvm.aarch64.hint(i32 1)"),
}


def barrier_ir(arch: str) -> str:
    """Return the LLVM IR of the barrier for an architecture."""
    declaration, call = _PAUSE.get(arch, ("", ""))
    return _TEXT.replace("@PAUSE_DECLARATION@", declaration).replace("@PAUSE@", call)


def wait(address: Any, threads: Any) -> None:
    """Emit: wait for all `threads`; `address` (int64) is BARRIER_BYTES of zeroed memory."""
    pointer = tir.buffer_at(address, "int32")
    T.evaluate(T.call_extern("int32", "ef_barrier", T.address_of(pointer[T.int64(0)]), threads))
