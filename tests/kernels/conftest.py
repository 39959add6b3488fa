"""What the tests of all kernels may use."""

from __future__ import annotations

import ctypes
import importlib
import mmap
from pathlib import Path

import pytest
import torch
from torch import Tensor

from edgeformer.compiler.backends import tvm_llvm
from edgeformer.compiler.target import ISA_FEATURES, detect
from edgeformer.runtime import launch, prebuild

# The instruction-set entries that this host can run.
RUNNABLE = {name for name, needed in ISA_FEATURES if needed <= detect().features} | {"portable16"}


class GuardedMemory:
    """Memory that ends at a page which may not be touched."""

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []

    def copy(self, x: Tensor) -> Tensor:
        """Return a copy of contiguous `x` whose last byte is the last readable one."""
        nbytes = x.numel() * x.element_size()
        pages = -(-nbytes // mmap.PAGESIZE)
        area = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        self._maps.append(area)
        address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        guard = ctypes.c_void_p(address + pages * mmap.PAGESIZE)
        assert ctypes.CDLL(None, use_errno=True).mprotect(guard, mmap.PAGESIZE, 0) == 0
        start = pages * mmap.PAGESIZE - nbytes
        raw = torch.frombuffer(area, dtype=torch.uint8, count=nbytes, offset=start)
        return raw.view(x.dtype).view(x.shape).copy_(x)


@pytest.fixture
def guarded_memory() -> GuardedMemory:
    """Memory with a guard page behind it."""
    return GuardedMemory()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Where many kernels are missing that the chosen tests will bind, every core builds some first."""
    if hasattr(session.config, "workerinput"):  # one of pytest-xdist's workers: they keep every core busy
        return
    builds = tvm_llvm.available() is None and tvm_llvm.linker(detect()) is not None
    if builds and not session.config.option.collectonly:
        prebuild.build_all(list(dict.fromkeys(filter(None, map(_missing, session.items)))))


def _missing(item: pytest.Item) -> prebuild.Job | None:
    """The job of a test's `spec` (or of that which its `name` has in PLAIN) on its `isa`, if not built."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    plain = getattr(getattr(item, "module", None), "PLAIN", {})
    spec, isa = parameters.get("spec", plain.get(parameters.get("name"))), parameters.get("isa", detect().isa)
    if Path(__file__).parent not in item.path.parents or spec is None or isa not in RUNNABLE:
        return None
    package = importlib.import_module(type(spec).__module__.rpartition(".")[0])
    form, target = package.OPERATOR.form("tvm_cpu"), detect().with_isa(isa)
    if form.decide(spec, target) is not None or launch.is_built(package.OPERATOR.name, form, spec, target):
        return None
    return prebuild.job_of(package.OPERATOR.name, form, spec, target)
