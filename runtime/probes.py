"""What this machine can do now: read bandwidth and dot products (default: on all cores)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from ..kernels.probe import TVM_CPU, ProbeSpec
from ..kernels.probe.operations import (
    LINE_BYTES,
    MATRIX_STEPS,
    TILE_STATE_BYTES,
    dot_operations,
    matrix_operations,
    multiply_add_operations,
)
from ..kernels.shared.isa.table import MATRIX
from ..kernels.shared.memory import aligned_empty, large_page_empty
from . import launch
from .dispatch import current_target
from .threads import set_threads

_MEGABYTE = 1 << 20
_ROUNDS = 20000


def read_bandwidth(threads: int | None = None, megabytes: int = 256, repeats: int = 5) -> float:
    """Return the best bytes per second of a read-only stream over `megabytes`."""
    count = set_threads(threads)
    data = large_page_empty(megabytes * _MEGABYTE + 16384)
    data.fill_(1)
    out = _read_out(count)
    read = _library().function("read")
    lines = megabytes * _MEGABYTE // LINE_BYTES
    return lines * LINE_BYTES / _best(lambda: read(count, lines, data.data_ptr(), out.data_ptr()), repeats)


def read_area(address: int, nbytes: int) -> float:
    """Return the bytes per second of reading the caller's memory once, on the threads that are set."""
    count, lines = torch.get_num_threads(), nbytes // LINE_BYTES
    out = _read_out(count)
    read = _library().function("read")
    start = time.perf_counter()
    read(count, lines, address, out.data_ptr())
    return lines * LINE_BYTES / (time.perf_counter() - start)


def reader(threads: int) -> Callable[[int, int], Any]:
    """Return a call that reads (address, bytes) once: the loop of `read_area`, to be timed by the caller."""
    function, out = _library().function("read"), _read_out(threads)
    return lambda address, nbytes: function(threads, nbytes // LINE_BYTES, address, out.data_ptr())


def _read_out(threads: int) -> torch.Tensor:
    """Return where the read loop keeps its results and its counter."""
    return torch.zeros((threads + 1) * 16, dtype=torch.int32)


def int8_dot_peak(threads: int | None = None, repeats: int = 5) -> float:
    """Return the best operations per second of the target's int8 dot product on operands in L1."""
    return _tile_peak("dot", threads, repeats) * dot_operations(current_target().isa, _ROUNDS)


def float_dot_peak(threads: int | None = None, repeats: int = 5) -> float:
    """Return the best operations per second of fp32 multiply-adds on operands in L1."""
    return _tile_peak("multiply_add", threads, repeats) * multiply_add_operations(
        current_target().isa, _ROUNDS
    )


def matrix_peak(threads: int | None = None, repeats: int = 5) -> float | None:
    """Return the best operations per second of a bf16 matrix unit on operands in L1; None without one.

    The operands are random: on zeros or ones the unit takes less power and runs faster.
    """
    if current_target().isa not in MATRIX:
        return None
    count = set_threads(threads)
    data = aligned_empty(MATRIX_STEPS * 4096 + count * TILE_STATE_BYTES)
    numbers = torch.randn(MATRIX_STEPS * 2048, generator=torch.Generator().manual_seed(0))
    data[: MATRIX_STEPS * 4096] = numbers.bfloat16().view(torch.uint8)
    out = aligned_empty(count * 4096)
    function = _library().function("matrix")
    call = lambda: function(count, _ROUNDS // 20, data.data_ptr(), out.data_ptr())  # noqa: E731
    return count * matrix_operations(_ROUNDS // 20) / _best(call, repeats)


def rounds(threads: int, count: int = _ROUNDS // 20) -> dict[str, tuple[Callable[[], Any], int]]:
    """Return (call, its operations) by arithmetic: short loops on operands in L1, to be timed by the caller.

    "int8" and "float" are the target's vectors, "bfloat16" a matrix unit's tiles, where there is one.
    """
    isa = current_target().isa
    data, out = torch.ones(1 << 14, dtype=torch.float32), torch.zeros(threads * 16)
    found = {}
    for kind, name, operations in (
        ("int8", "dot", dot_operations), ("float", "multiply_add", multiply_add_operations)
    ):  # fmt: skip
        function = _library().function(name)
        call = lambda f=function: f(threads, count, data.data_ptr(), out.data_ptr())  # noqa: E731
        found[kind] = (call, threads * operations(isa, count))
    if isa in MATRIX:
        tiles = aligned_empty(MATRIX_STEPS * 4096 + threads * TILE_STATE_BYTES)
        numbers = torch.randn(MATRIX_STEPS * 2048, generator=torch.Generator().manual_seed(0))
        tiles[: MATRIX_STEPS * 4096] = numbers.bfloat16().view(torch.uint8)
        results, matrix = aligned_empty(threads * 4096), _library().function("matrix")
        call = lambda: matrix(threads, count, tiles.data_ptr(), results.data_ptr())  # noqa: E731
        found["bfloat16"] = (call, threads * matrix_operations(count))
    return found


def _tile_peak(name: str, threads: int | None, repeats: int) -> float:
    """Return how often a second all threads together finish _ROUNDS rounds of a tile."""
    count = set_threads(threads)
    data, out = torch.ones(1 << 14, dtype=torch.float32), torch.zeros(count * 16)
    function = _library().function(name)
    return count / _best(lambda: function(count, _ROUNDS, data.data_ptr(), out.data_ptr()), repeats)


def _library() -> Any:
    spec, target = ProbeSpec(), current_target()
    return launch.load_or_build("probe", TVM_CPU, spec, {}, target)


def _best(call: Any, repeats: int) -> float:
    call()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
