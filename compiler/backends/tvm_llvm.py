"""TVM's LLVM code generator: PrimFuncs to a shared library, loaded by tvm_ffi alone (no TVM at run time)."""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BuildError, TargetError
from ..target import ISA_FEATURES, Target

LIBRARY_NAME = "kernels.so"
_BROKEN_FFI = "0.1.15"
# LLVM's names of Arm's features by Linux's, where kernels gain by them.
_ARM_FEATURES = {
    "asimddp": "dotprod", "asimdhp": "fullfp16", "i8mm": "i8mm", "bf16": "bf16", "sve": "sve", "sve2": "sve2",
}  # fmt: skip
# And of x86's: without what a kernel asks for by name LLVM ends the process, and a CPU that is unknown, or of
# which a virtual machine hides something, goes by the name of an older one.
_X86_FEATURES = {
    "sse3": "sse3", "ssse3": "ssse3", "sse4_1": "sse4.1", "sse4_2": "sse4.2", "popcnt": "popcnt",
    "avx": "avx", "avx2": "avx2", "fma": "fma", "f16c": "f16c", "bmi1": "bmi", "bmi2": "bmi2", "gfni": "gfni",
    "avx_vnni": "avxvnni", "avx512f": "avx512f", "avx512bw": "avx512bw", "avx512cd": "avx512cd",
    "avx512dq": "avx512dq", "avx512vl": "avx512vl", "avx512_vnni": "avx512vnni", "avx512vbmi": "avx512vbmi",
    "avx512_vbmi2": "avx512vbmi2", "avx512_bitalg": "avx512bitalg", "avx512_bf16": "avx512bf16",
    "avx512_vpopcntdq": "avx512vpopcntdq", "amx_tile": "amx-tile", "amx_int8": "amx-int8",
    "amx_bf16": "amx-bf16",
}  # fmt: skip


@dataclass(frozen=True)
class Inspection:
    """What the assembly of a built module shows: counts over the functions' bodies."""

    instructions: int
    spills: int
    assembly: str

    def count(self, mnemonic: str) -> int:
        """Return how many instructions start with `mnemonic`."""
        return len(re.findall(rf"^\s+(?:\{{\w+\}}\s*)?{mnemonic}", self.assembly, re.MULTILINE))


def available() -> str | None:
    """Return None when this back end can build here, else the reason."""
    for package in ("apache-tvm", "apache-tvm-ffi"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"{package} is not installed; pip install 'edgeformer[cpu]'"
    return ffi_problem(importlib.metadata.version("apache-tvm-ffi"))


def ffi_problem(version: str) -> str | None:
    """Return what is wrong with an apache-tvm-ffi version, or None."""
    numbers = tuple(int(word) for word in re.findall(r"\d+", version)[:3])
    if numbers >= tuple(int(word) for word in _BROKEN_FFI.split(".")):
        return (
            f"apache-tvm-ffi {version} crashes with apache-tvm 0.27; pip install apache-tvm-ffi==0.1.14.post0"
        )
    return None


def versions() -> str:
    """Return the tool versions that belong into an artifact's key. Raises BuildError when one is missing."""
    try:
        return " ".join(f"{p}={importlib.metadata.version(p)}" for p in ("apache-tvm", "apache-tvm-ffi"))
    except importlib.metadata.PackageNotFoundError as error:
        raise BuildError(available()) from error


def compile_module(functions: list[Any], target: Target, level: int = 3) -> Any:
    """Compile PrimFuncs for `target` and return TVM's executable. Raises BuildError with TVM's text.

    `level` is LLVM's -O; 0 takes a third of the time, for checks of what is computed, not how fast.
    """
    if problem := available():
        raise BuildError(problem)
    if lacking := sorted(_needed(target.isa) - target.features):
        raise BuildError(f"{target.name} lacks {', '.join(lacking)}, which the {target.isa} kernels need")
    os.environ["TVM_BIND_THREADS"] = "0"  # TVM pins the calling thread by default
    import tvm

    _require_known_cpu(_llvm_target(target))
    module = tvm.IRModule({str(f.attrs["global_symbol"]): f for f in functions})
    options = _llvm_target(target) | ({} if level == 3 else {"opt-level": level})
    try:
        return tvm.compile(module, tvm.target.Target(options), tir_pipeline=_pipeline())
    except Exception as error:
        raise BuildError(f"TVM could not compile for {target.name}: {str(error).strip()[-600:]}") from error


def _needed(isa: str) -> frozenset[str]:
    """Return the features of an instruction-set entry: without them LLVM ends the process."""
    return next((needed for name, needed in ISA_FEATURES if name == isa), frozenset())


def _require_known_cpu(options: dict[str, Any]) -> None:
    """Raise TargetError for a CPU that LLVM does not know: it would compile for a generic one in silence."""
    known = _known_cpus(options["mtriple"])
    if options["mcpu"] not in known:
        close = difflib.get_close_matches(options["mcpu"], known, n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise TargetError(f"LLVM knows no {options['mtriple'].split('-')[0]} CPU {options['mcpu']!r}.{hint}")


@functools.cache
def _known_cpus(triple: str) -> tuple[str, ...]:
    import tvm

    target = tvm.target.Target({"kind": "llvm", "mtriple": triple})
    return tuple(str(name) for name in tvm.target.codegen.llvm_get_cpu_archlist(target))


@functools.cache
def _pipeline() -> str:
    """Register and name the passes that our kernels need.

    They are emitted in their final shape, so TVM's schedule passes have nothing to do; its simplifier
    takes tens of seconds on long chains of bound vector values, which LLVM cleans up in milliseconds.
    """
    import tvm
    from tvm import s_tir, tirx
    from tvm.s_tir.pipeline import finalize_device_passes, finalize_host_passes
    from tvm.tirx import compilation_pipeline

    passes = [
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.BF16ComputeLegalize(),
        tirx.transform.VectorizeLoop(True),
        tirx.transform.UnrollLoop(),
        tirx.transform.AnnotateEntryFunc(),
        tirx.transform.SplitHostDevice(),
        tirx.transform.MakePackedAPI(),
        tirx.transform.BF16StorageLegalize(),
    ]

    @tvm.transform.module_pass(opt_level=0)
    def lower(module: Any, context: Any) -> Any:
        return tvm.ir.transform.Sequential(passes)(module)

    def factory() -> tuple[Any, Any, Any]:
        return lower, finalize_host_passes, finalize_device_passes

    compilation_pipeline.register_tir_pipeline("edgeformer", factory)
    return "edgeformer"


def _llvm_target(target: Target) -> dict[str, Any]:
    triple = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}.get(target.arch)
    if triple is None:
        raise BuildError(f"no LLVM triple for architecture {target.arch!r}")
    options: dict[str, Any] = {"kind": "llvm", "mtriple": triple, "mcpu": target.mcpu}
    names = _ARM_FEATURES if target.arch == "aarch64" else _X86_FEATURES
    features = target.features & names.keys()
    # An ISA entry below the CPU's own must not meet instructions above it.
    if target.arch == "x86_64" and target.isa == "portable":
        options["mcpu"] = "x86-64-v2" if {"sse4_2", "popcnt"} <= features else "x86-64"
        features = frozenset[str]()
    # What the CPU's name does not say ("generic": nothing but NEON).
    options["mattr"] = [f"+{names[feature]}" for feature in sorted(features)]
    if target.isa in ("amx", "avx512_vnni", "avx512"):
        options["mattr"].append("-prefer-256-bit")  # LLVM would split 512-bit stores on Intel's CPUs
    return options


def build(functions: list[Any], target: Target, folder: Path) -> None:
    """Compile `functions` and link them to `folder`/kernels.so. Raises BuildError."""
    link(compile_module(functions, target), target, folder)


def link(executable: Any, target: Target, folder: Path) -> None:
    """Link what `compile_module` returned to `folder`/kernels.so. Raises BuildError."""
    command = linker(target)
    if command is None:
        raise BuildError(no_linker(target))
    object_file = folder / "kernels.o"
    object_file.write_bytes(_object_code(executable))
    run_tool([*command, "-shared", "-o", str(folder / LIBRARY_NAME), str(object_file), "-lm"])
    object_file.unlink()


def _object_code(executable: Any) -> bytes:
    """Return the object file's bytes. LLVM ends the process on a full disk, so it writes to memory."""
    if not hasattr(os, "memfd_create"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernels.o"
            executable.mod.write_to_file(str(path), "o")
            return path.read_bytes()
    descriptor = os.memfd_create("kernels.o")
    try:
        executable.mod.write_to_file(f"/proc/self/fd/{descriptor}", "o")
        with os.fdopen(os.dup(descriptor), "rb") as file:
            file.seek(0)
            return file.read()
    finally:
        os.close(descriptor)


def run_tool(command: list[str]) -> None:
    """Run a compiler or linker; raise BuildError with its own words, or OSError when the disk is full."""
    try:
        env = os.environ | {"LC_ALL": "C"}  # its words are read below
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=env)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from error
    if result.returncode:
        if "No space left" in result.stderr:
            raise OSError(28, f"{command[0]}: no space left on device")
        raise BuildError(f"{' '.join(command[:3])} failed: {result.stderr.strip()[-600:]}")


def no_linker(target: Target) -> str:
    """Say what to install so that code for `target` can be linked here."""
    if target.arch == _host_arch():
        return "no linker: install gcc or clang, or `pip install ziglang`"
    package = f"gcc-{target.arch.replace('_', '-')}-linux-gnu"
    return f"no linker for {target.arch}: `pip install ziglang`, or {package} of Debian and Ubuntu"


def _host_arch() -> str:
    machine = os.uname().machine
    return {"arm64": "aarch64"}.get(machine, machine)


def linker(target: Target) -> list[str] | None:
    """Return the command that links for `target`: the system's compiler, else ziglang's, else None."""
    if target.arch == _host_arch():
        for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
            if name and shutil.which(name):
                return [name]
    else:
        cross = f"{target.arch}-linux-gnu-gcc"
        if shutil.which(cross):
            return [cross]
    if _has_ziglang():
        # The C library of the wheels that run the result (manylinux_2_28).
        return [sys.executable, "-m", "ziglang", "cc", "-target", f"{target.arch}-linux-gnu.2.28"]
    return None


@functools.cache
def _has_ziglang() -> bool:
    try:
        importlib.metadata.version("ziglang")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def load(path: Path) -> LoadedLibrary:
    """Load a library that `build` wrote. Never imports tvm."""
    return LoadedLibrary(path)


class LoadedLibrary:
    """A loaded kernels.so: native functions by name."""

    def __init__(self, path: Path) -> None:
        import ctypes

        import torch  # noqa: F401  its OpenMP runtime has to be the first in the process
        import tvm_ffi

        try:
            self._module = tvm_ffi.load_module(str(path))
            self.handle = ctypes.CDLL(str(path))
        except (OSError, RuntimeError) as error:
            raise BuildError(f"cannot load {path}: {error}") from error
        self.path = path

    def function(self, name: str) -> Callable[..., Any]:
        """Return the native function `name`."""
        return self._module.get_function(name)


class JitLibrary:
    """Kernels compiled in this process, where there is no linker: they run on TVM's own thread pool."""

    def __init__(self, executable: Any) -> None:
        self._executable = executable
        self.handle = None

    def function(self, name: str) -> Callable[..., Any]:
        """Return the compiled function `name`."""
        return self._executable[name]


def inspect(functions: list[Any], target: Target) -> Inspection:
    """Compile `functions` and read the assembly: instructions, and vector spills to the stack."""
    return inspect_executable(compile_module(functions, target))


def inspect_executable(executable: Any) -> Inspection:
    """Read the assembly of what `compile_module` returned."""
    assembly = executable.mod.inspect_source("asm")
    body = [line for line in assembly.splitlines() if line.startswith("\t") and not line.startswith("\t.")]
    spills = sum("Spill" in line or bool(re.search(r"[xyz]mm\d+, -?\d*\(%rsp", line)) for line in body)
    return Inspection(len(body), spills, assembly)
