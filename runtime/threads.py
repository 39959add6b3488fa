"""One thread pool: compiled kernels run on the OpenMP threads that torch already has."""

from __future__ import annotations

import ctypes
import functools
import glob
import os
import sys
from importlib import resources
from pathlib import Path

from ..compiler.artifacts import ArtifactKey, ArtifactStore
from ..compiler.backends import tvm_llvm
from ..compiler.errors import BuildError
from ..compiler.target import Target, available_cores, detect

_OPENMP_SYMBOLS = (
    "GOMP_parallel",
    "omp_get_thread_num",
    "omp_get_num_threads",
    "omp_get_max_threads",
    "omp_in_parallel",
)


def set_threads(count: int | None = None) -> int:
    """Set how many threads torch and the compiled kernels use (default: this process's cores); return it."""
    import torch

    count = count or available_cores()
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
    return count


def team_size() -> int:
    """Return how many threads a launch really gets; a kernel with barriers must not count on more."""
    return int(launcher().ef_team_size())


def attach(library: tvm_llvm.LoadedLibrary) -> None:
    """Point a loaded library's parallel launch and workspace calls at the shared pool."""
    shim = launcher()
    hooks = {
        "__TVMBackendParallelLaunch": "ef_parallel_launch",
        "__TVMBackendAllocWorkspace": "ef_workspace_alloc",
        "__TVMBackendFreeWorkspace": "ef_workspace_free",
    }
    for symbol, function in hooks.items():
        try:
            pointer = ctypes.c_void_p.in_dll(library.handle, symbol)
        except ValueError:  # this library has no parallel loop or no workspace
            continue
        pointer.value = ctypes.cast(getattr(shim, function), ctypes.c_void_p).value


_travelled: Path | None = None


def use_launcher(path: Path) -> None:
    """Take the launcher of a compiled folder instead of building one; no effect once one is loaded."""
    global _travelled
    _travelled = path


@functools.cache
def launcher() -> ctypes.CDLL:
    """Return the loaded launcher, built once with the host's linker. Raises BuildError where none fits."""
    openmp = _openmp()
    shim = ctypes.CDLL(str(_travelled or launcher_file(detect())))
    addresses = [ctypes.cast(getattr(openmp, name), ctypes.c_void_p) for name in _OPENMP_SYMBOLS]
    shim.ef_initialise(*addresses)
    return shim


def launcher_file(target: Target) -> Path:
    """Return the launcher's library for a target, built if the store has none. Raises BuildError."""
    source = (resources.files(__package__ or "") / "launcher.c").read_text()
    key = ArtifactKey("launcher", "c", "1", "", target.arch, sys.platform, source)

    def build(folder: Path) -> None:
        command = tvm_llvm.linker(target)
        if command is None:
            raise BuildError(tvm_llvm.no_linker(target))
        path = folder / "launcher.c"
        path.write_text(source)
        tvm_llvm.run_tool(
            [*command, "-O2", "-shared", "-fPIC", "-o", str(folder / tvm_llvm.LIBRARY_NAME), str(path)]
        )

    store = ArtifactStore()
    folder = store.get(key) or store.put(key, build)[0]
    return folder / tvm_llvm.LIBRARY_NAME


def _openmp() -> ctypes.CDLL:
    """Return the OpenMP runtime that torch loaded, found by what this process has mapped."""
    import torch

    folder = Path(torch.__file__).parent / "lib"
    candidates = glob.glob(str(folder / "*omp*")) + glob.glob(
        str(folder.parent.parent / "torch.libs" / "*omp*")
    )
    if os.path.exists("/proc/self/maps"):
        lines = Path("/proc/self/maps").read_text().splitlines()
        mapped = {line.split()[-1] for line in lines if "omp" in line and ".so" in line}
        candidates = (
            sorted(p for p in mapped if any(n in os.path.basename(p) for n in ("gomp", "libomp", "iomp")))
            + candidates
        )
    for path in candidates:
        try:
            library = ctypes.CDLL(path)
            if all(hasattr(library, name) for name in _OPENMP_SYMBOLS):
                return library
        except OSError:
            continue
    raise BuildError("torch's OpenMP runtime was not found; kernels cannot share its threads")
