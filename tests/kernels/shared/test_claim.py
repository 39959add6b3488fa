"""Claimed work: whatever the number of threads, each piece is done once, by one of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from edgeformer.compiler.backends import tvm_llvm
from edgeformer.compiler.target import Target, detect
from edgeformer.runtime import threads

SPARE = 16


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def counting(arch: str) -> Any:
    """A kernel that counts, thread by thread, how often it did each piece."""
    from edgeformer.kernels.shared import tir
    from edgeformer.kernels.shared.barrier import barrier_ir, wait
    from edgeformer.kernels.shared.claim import claimed, reset

    names = ("threads", "total", "width", "barrier", "counter")
    kernel = tir.Kernel("count", [*((name, "int64") for name in names), ("out", "*int64")])
    reset(kernel["counter"])
    with tir.import_llvm(barrier_ir(arch)), tir.parallel(kernel["threads"]) as thread:
        wait(kernel["barrier"], kernel["threads"])  # all start at once, or one thread would do it all
        with claimed(kernel["counter"], kernel["total"]) as piece:
            at = tir.let(thread * kernel["width"] + piece)
            tir.store(kernel["out"], at, tir.load(kernel["out"], at) + 1)
    return kernel.finish()


def taking(arch: str) -> Any:
    """As `counting`, of pieces that each thread offers: [bounds[t], bounds[t + 1])."""
    from edgeformer.kernels.shared import tir
    from edgeformer.kernels.shared.barrier import barrier_ir, wait
    from edgeformer.kernels.shared.claim import offer, taken

    names = ("threads", "width", "barrier", "ranges")
    arrays = [("bounds", "*int64"), ("out", "*int64")]
    kernel = tir.Kernel("take", [*((name, "int64") for name in names), *arrays])
    with tir.import_llvm(barrier_ir(arch)), tir.parallel(kernel["threads"]) as thread:
        first, last = (tir.let(tir.load(kernel["bounds"], thread + i)) for i in range(2))
        offer(tir.let(kernel["ranges"] + thread * 64), first, last)
        wait(kernel["barrier"], kernel["threads"])
        with taken(kernel["ranges"], 64, thread, kernel["threads"]) as piece:
            at = tir.let(thread * kernel["width"] + piece)
            tir.store(kernel["out"], at, tir.load(kernel["out"], at) + 1)
    return kernel.finish()


@pytest.fixture(scope="module")
def take_pieces(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[int]], torch.Tensor]:
    """f(bounds) -> how often each piece was done by each thread [threads, total + SPARE]."""
    folder = tmp_path_factory.mktemp("take")
    tvm_llvm.build([taking(detect().arch)], detect(), folder)
    library = tvm_llvm.load(folder / tvm_llvm.LIBRARY_NAME)
    threads.attach(library)
    function = library.function("take")

    def call(bounds: list[int]) -> torch.Tensor:
        count, width = len(bounds) - 1, bounds[-1] + SPARE
        torch.set_num_threads(count)
        assert threads.team_size() == count, "a barrier waits for all of them"
        out = torch.zeros((count, width), dtype=torch.int64)
        limits = torch.tensor(bounds)
        barrier, ranges = torch.zeros(256, dtype=torch.uint8), torch.full((count * 8,), -1)
        function(count, width, *(t.data_ptr() for t in (barrier, ranges, limits, out)))
        return out

    return call


@pytest.fixture(scope="module")
def count_pieces(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], torch.Tensor]:
    """f(count, total) -> how often each piece was done by each of `count` threads [count, total + SPARE]."""
    folder = tmp_path_factory.mktemp("claim")
    tvm_llvm.build([counting(detect().arch)], detect(), folder)
    library = tvm_llvm.load(folder / tvm_llvm.LIBRARY_NAME)
    threads.attach(library)
    function = library.function("count")

    def call(count: int, total: int) -> torch.Tensor:
        torch.set_num_threads(count)
        assert threads.team_size() == count, "a barrier waits for all of them"
        out = torch.zeros((count, total + SPARE), dtype=torch.int64)
        barrier = torch.zeros(256, dtype=torch.uint8)
        counter = torch.full((16,), -12345, dtype=torch.int64)
        places = (barrier.data_ptr(), counter[8:].data_ptr(), out.data_ptr())
        function(count, total, total + SPARE, *places)
        assert (counter[:8] == -12345).all() and (counter[9:] == -12345).all()
        assert total <= counter[8] <= total + count  # a thread that finds nothing has counted too
        return out

    return call


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("total", [0, 1, 2, 7, 1000, 200_003])
def test_every_piece_is_done_once(
    count_pieces: Callable[[int, int], torch.Tensor], count: int, total: int
) -> None:
    for _ in range(3):  # all pieces are there again in the next launch
        done = count_pieces(count, total)
        assert (done[:, :total].sum(0) == 1).all()
        assert (done[:, total:] == 0).all()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("total", [0, 1, 2, 7, 1000, 200_003])
def test_every_offered_piece_is_done_once(
    take_pieces: Callable[[list[int]], torch.Tensor], count: int, total: int
) -> None:
    even = [total * i // count for i in range(count + 1)]
    for bounds in (even, [0] * count + [total], [0] + [total] * count):  # most threads may have none
        for _ in range(3):
            done = take_pieces(bounds)
            assert (done[:, :total].sum(0) == 1).all()
            assert (done[:, total:] == 0).all()


def test_who_has_nothing_takes_from_the_end(take_pieces: Callable[[list[int]], torch.Tensor]) -> None:
    helped = 0
    for _ in range(20):
        mine, theirs = take_pieces([0, 200_000, 200_000])[:, :200_000]
        helped += int(theirs.sum())
        begin = int(theirs.argmax()) if theirs.any() else 200_000
        assert theirs[begin:].all() and mine[:begin].all()
    assert helped, "one thread did all of the pieces of twenty launches"


def test_a_claim_is_one_atomic_instruction() -> None:
    """Where threads rarely run at the same time, a claim in two steps would pass the test above."""
    inspection = tvm_llvm.inspect([counting("x86_64")], Target.parse("x86-64-v2"))
    claims = re.findall(r"lock\s+xaddq\s", inspection.assembly)
    assert claims, "the counter is 64 bits wide, the barrier's 32"
