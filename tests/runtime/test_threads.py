"""Threads: compiled kernels run on torch's own OpenMP threads."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from edgeformer.compiler.backends import tvm_llvm
from edgeformer.compiler.errors import BuildError
from edgeformer.compiler.target import available_cores, detect
from edgeformer.runtime import threads


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def filling():
    """A kernel that writes 3 i + 1 at each of n places, in parallel."""
    from edgeformer.kernels.shared import tir

    kernel = tir.Kernel("fill", [("n", "int64"), ("out", "*int64")])
    with tir.parallel(kernel["n"]) as i:
        tir.store(kernel["out"], i, i * 3 + 1)
    return kernel.finish()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tvm_llvm.LoadedLibrary:
    folder = tmp_path_factory.mktemp("threads")
    tvm_llvm.build([filling()], detect(), folder)
    loaded = tvm_llvm.load(folder / tvm_llvm.LIBRARY_NAME)
    threads.attach(loaded)
    return loaded


def native_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_set_threads_returns_the_count() -> None:
    assert threads.set_threads(1) == 1 == torch.get_num_threads()
    assert threads.set_threads(3) == 3 == torch.get_num_threads()
    assert threads.set_threads() == available_cores() == torch.get_num_threads()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_part_runs_once_on_any_number_of_threads(library: tvm_llvm.LoadedLibrary, count: int) -> None:
    torch.set_num_threads(count)
    for n in (0, 1, 2, count, 1000):
        out = torch.zeros(n + 1, dtype=torch.int64)
        library.function("fill")(n, out.data_ptr())
        assert out.tolist() == [*(3 * i + 1 for i in range(n)), 0]


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_kernels_start_no_threads_of_their_own(library: tvm_llvm.LoadedLibrary) -> None:
    torch.set_num_threads(4)
    torch.ones(1 << 22).sum()  # torch's pool is up
    out = torch.zeros(100, dtype=torch.int64)
    library.function("fill")(100, out.data_ptr())
    before = native_threads()
    for _ in range(5):
        library.function("fill")(100, out.data_ptr())
        torch.ones(1 << 22).sum()
    assert native_threads() == before


def test_python_threads_may_call_at_once(library: tvm_llvm.LoadedLibrary) -> None:
    torch.set_num_threads(2)

    def call(n: int) -> bool:
        good = True
        for _ in range(200):
            out = torch.zeros(n, dtype=torch.int64)
            library.function("fill")(n, out.data_ptr())
            good &= out.tolist() == [3 * i + 1 for i in range(n)]
        return good

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(call, (10, 100, 333)))


def test_inside_a_parallel_region_a_kernel_runs_on_one_thread() -> None:
    shim = threads.launcher()
    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    seen: list[tuple[int, int]] = []

    def body(task: int, env: int, data: int) -> int:
        count = ctypes.cast(env + ctypes.sizeof(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int32))[0]
        seen.append((task, count))
        return 7 if data else 0

    launch = shim.ef_parallel_launch
    launch.argtypes = [kind, ctypes.c_void_p, ctypes.c_int]
    function = kind(body)
    assert launch(function, None, 1) == 0 and seen == [(0, 1)]
    assert launch(function, 1, 1) == 7  # a task's error is the launch's
    seen.clear()
    torch.set_num_threads(3)
    assert launch(function, None, 0) == 0 and sorted(seen) == [(i, 3) for i in range(3)]


def test_workspace_is_aligned() -> None:
    shim = threads.launcher()
    shim.ef_workspace_alloc.restype = ctypes.c_void_p
    shim.ef_workspace_alloc.argtypes = [
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_uint64,
        ctypes.c_int,
        ctypes.c_int,
    ]
    shim.ef_workspace_free.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    for nbytes in (0, 1, 1000, 1 << 20):
        address = shim.ef_workspace_alloc(1, 0, nbytes, 0, 8)
        assert address and address % 64 == 0
        ctypes.memset(address, 0, nbytes)
        assert shim.ef_workspace_free(1, 0, address) == 0
    assert shim.ef_workspace_alloc(1, 0, 1 << 62, 0, 8) is None


def test_without_a_compiler_the_launcher_says_what_to_install(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tvm_llvm, "linker", lambda target: None)
    monkeypatch.setattr(threads, "_travelled", None)
    with pytest.raises(BuildError, match="install gcc or clang.*ziglang"):
        threads.launcher.__wrapped__()


def test_a_library_without_parallel_loops_needs_nothing() -> None:
    threads.attach(SimpleNamespace(handle=ctypes.CDLL(None)))  # pyright: ignore[reportArgumentType]
