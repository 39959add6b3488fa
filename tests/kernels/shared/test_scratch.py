"""Scratch memory: aligned, growing, and one for each Python thread."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from edgeformer.kernels.shared.scratch import scratch, scratch_bytes


def test_scratch_is_aligned_writable_and_kept() -> None:
    for nbytes in (0, 1, 63, 64, 1000, 3 << 20):
        address = scratch(nbytes)
        assert address % 64 == 0 and scratch_bytes() >= nbytes + address % 64
        ctypes.memset(address, 1, nbytes)
    assert scratch(10) == scratch(1 << 20)


def test_threads_do_not_share_scratch() -> None:
    barrier = Barrier(4)

    def use(_: int) -> int:
        address = scratch(1000)
        barrier.wait()
        return address

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(use, range(4)))) == 4
