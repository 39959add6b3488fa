"""Scratch memory: aligned, growing, and one for each Python thread; weights' memory in pieces of slabs."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from edgeformer.kernels.shared import memory
from edgeformer.kernels.shared import scratch as scratch_module
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


def test_arena_pieces_are_aligned_and_apart() -> None:
    arena = memory.Arena()
    sizes = [1, 64, 100, 5 << 20, 63, 9 << 20, 20 << 20, 7 << 20, 3]
    pieces = [arena.take(size).fill_(i) for i, size in enumerate(sizes)]
    for i, (piece, size) in enumerate(zip(pieces, sizes)):
        assert piece.numel() == size and piece.data_ptr() % 64 == 0
        assert (piece == i).all(), "another piece lies over this one"


@pytest.mark.parametrize("alignment", [64, 4096, memory.LARGE_PAGE])
def test_aligned_empty(alignment: int) -> None:
    for nbytes in (0, 1, 65, 100_000):
        held = memory.aligned_empty(nbytes, alignment)
        assert held.numel() == nbytes and (nbytes == 0 or held.data_ptr() % alignment == 0)


def test_without_large_pages_memory_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_madvise", lambda: None)
    assert memory.large_page_empty(3 << 20).fill_(7).sum(dtype=torch.int64) == 7 * (3 << 20)


def test_scratch_taken_in_inference_mode_is_ordinary_memory() -> None:
    def take() -> bool:
        with torch.inference_mode():
            scratch(100)
        held = scratch_module.local.buffer
        assert held is not None
        return held.is_inference()

    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(take).result()
