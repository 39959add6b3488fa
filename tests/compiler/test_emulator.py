"""qemu as host of a library: this process lends its memory, and what goes wrong there is an error here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeformer.compiler import emulator
from edgeformer.compiler.backends import tvm_llvm
from edgeformer.compiler.emulator import EmulatedLibrary
from edgeformer.compiler.errors import BuildError
from edgeformer.compiler.target import Target

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedLibrary]:
    """twice(n, x, y): y = 2 x; through(table, y): y[i] = *table[i]; team(n, y): y[i] = i + 1, in parallel;
    clear(n, y): y = 0."""
    from edgeformer.kernels.shared import tir
    from edgeformer.kernels.shared.tir import T

    functions: list[Any] = []
    k = tir.Kernel("twice", [("n", "int64"), ("x", "*float32"), ("y", "*float32"), ("factor", "float32")])
    with tir.loop(k["n"]) as i:
        tir.store(k["y"], i, tir.load(k["x"], i) * k["factor"])
    functions.append(k.finish())
    k = tir.Kernel("through", [("n", "int64"), ("table", "*int64"), ("y", "*float32")])
    with tir.loop(k["n"]) as i:
        tir.store(k["y"], i, tir.load(tir.buffer_at(tir.let(tir.load(k["table"], i)), "float32"), 0))
    functions.append(k.finish())
    k = tir.Kernel("team", [("n", "int64"), ("y", "*int64")])
    with tir.parallel(k["n"]) as i:
        tir.store(k["y"], i, tir.let(i + 1) * T.int64(1))
    functions.append(k.finish())
    k = tir.Kernel("clear", [("n", "int64"), ("y", "*float32")])
    with tir.loop(k["n"]) as i:
        tir.store(k["y"], i, T.float32(0))
    functions.append(k.finish())
    folder, target = tmp_path_factory.mktemp("library"), Target.parse("raspberry-pi-5")
    tvm_llvm.build(functions, target, folder)
    library = EmulatedLibrary(folder / tvm_llvm.LIBRARY_NAME, emulator.cpu_for(target), threads=3)
    yield library
    library.close()


@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="pip install ziglang")
def test_ziglang_links_for_a_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no other cross linker."""
    from edgeformer.kernels.shared import tir

    target = Target.parse("raspberry-pi-5")
    k = tir.Kernel("twice", [("n", "int64"), ("x", "*float32")])
    with tir.loop(k["n"]) as i:
        tir.store(k["x"], i, tir.load(k["x"], i) * 2.0)
    with monkeypatch.context() as patch:
        patch.setattr(tvm_llvm.shutil, "which", lambda name: None)
        assert "ziglang" in (tvm_llvm.linker(target) or [])
        tvm_llvm.build([k.finish()], target, tmp_path)
    library, x = EmulatedLibrary(tmp_path / tvm_llvm.LIBRARY_NAME, emulator.cpu_for(target)), torch.ones(7)
    library.function("twice")(7, x.data_ptr())
    assert x.tolist() == [2] * 7


def test_memory_is_shared_in_both_directions(library: EmulatedLibrary) -> None:
    x, y = torch.randn(100_001), torch.full((100_003,), torch.nan)
    for factor in (2.0, -3.0):
        library.function("twice")(x.numel(), x.data_ptr(), y.data_ptr() + 4, factor)
        assert y[0].isnan() and y[-1].isnan() and torch.equal(y[1:-1], x * factor)


def test_addresses_in_memory_are_valid_there(library: EmulatedLibrary) -> None:
    parts = [torch.tensor([float(i)]) for i in range(50)]
    table = torch.tensor([part.data_ptr() for part in parts])
    y = torch.empty(50)
    library.function("through")(50, table.data_ptr(), y.data_ptr())
    assert torch.equal(y, torch.arange(50.0))


def test_threads_share_memory(library: EmulatedLibrary) -> None:
    for count in (1, 7, 300_000):
        y = torch.zeros(count, dtype=torch.int64)
        library.function("team")(count, y.data_ptr())
        assert torch.equal(y, torch.arange(1, count + 1))


def test_a_page_may_end_anywhere_in_what_is_cleared(library: EmulatedLibrary) -> None:
    assert b"memset" in library.path.read_bytes()  # LLVM's word for the loop
    arena, n = torch.empty(3 * emulator.PAGE // 4), 192
    page = -(arena.data_ptr() // -emulator.PAGE) + 1
    for behind in range(n):  # elements on the second page
        arena.fill_(torch.nan)
        first = (page * emulator.PAGE - arena.data_ptr()) // 4 - n + behind
        library.function("clear")(n, arena.data_ptr() + 4 * first)
        assert arena.isnan().sum() == arena.numel() - n and not arena[first : first + n].any()


def test_errors_are_told_and_the_next_call_is_right(library: EmulatedLibrary, tmp_path: Path) -> None:
    x = torch.ones(3)
    with pytest.raises(BuildError, match="outside"):
        library.function("twice")(3, 1 << 44, x.data_ptr(), 2.0)
    with pytest.raises(BuildError, match="no function nothing"):
        library.function("nothing")(3)
    library.function("twice")(3, x.data_ptr(), x.data_ptr(), 5.0)
    assert x.tolist() == [5, 5, 5]
    (tmp_path / "kernels.so").write_bytes(b"no library")
    broken = EmulatedLibrary(tmp_path / "kernels.so")
    for ended in (True, False):
        if ended:  # before it is told what to run
            broken._start().wait()
        with pytest.raises(BuildError, match="kernels.so"):
            broken.function("twice")(0, 0, 0, 1.0)
