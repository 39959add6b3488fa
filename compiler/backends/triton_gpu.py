"""Kernels for GPUs through Triton: compiled for a device that need not be there, read, stored, loaded
again.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..devices import device
from ..errors import BuildError, TargetError, UnsupportedError
from .triton_inspect import Inspection, inspect_amd, inspect_nvidia

__all__ = ["ARCHITECTURES", "Architecture", "Inspection", "KernelBuild", "available", "build",
    "compile_kernel",
           "inspect", "load"]  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A GPU architecture: Triton's back end, lanes of a wave, bytes of LDS of a workgroup, and its family.

    Families share defaults: "cdna" (MFMA, 64 lanes), "rdna3" and "rdna4" (WMMA, 32 lanes; rdna3 doubles the
    operands of a matrix instruction), "ampere" and "hopper".
    """

    name: str
    backend: str
    lanes: int
    shared_bytes: int
    family: str


ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("gfx90a", "hip", 64, 64 << 10, "cdna"),
        Architecture("gfx942", "hip", 64, 64 << 10, "cdna"),
        Architecture("gfx1100", "hip", 32, 64 << 10, "rdna3"),
        Architecture("gfx1103", "hip", 32, 64 << 10, "rdna3"),
        Architecture("gfx1151", "hip", 32, 64 << 10, "rdna3"),
        Architecture("gfx1201", "hip", 32, 64 << 10, "rdna4"),
        Architecture("sm_80", "cuda", 32, 163 << 10, "ampere"),
        Architecture("sm_89", "cuda", 32, 99 << 10, "ampere"),
        Architecture("sm_90", "cuda", 32, 227 << 10, "hopper"),
    )
}


DEVICES = ("cuda", "xpu")  # as PyTorch names them


@dataclass(frozen=True)
class KernelBuild:
    """One kernel as it is compiled: a `triton.jit` function, its argument types, constants and options.

    `signature` gives the type of every run-time argument ("*fp16", "i32", "fp32"), `constants` the value of
    every `tl.constexpr`; `divisible` are integers that are multiples of 16. `contracting` says that its hot
    loop must hold matrix instructions, `cached` that its narrow loads are scales, flags or a few rows that
    the cache holds, beside a wide stream.
    `tile` names the default that gave the tile and options, `streams` says that most of what it loads comes
    from memory once, and `step_bytes` how much that is a step of its hot loop where nothing contracts.
    """

    name: str
    function: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    contracting: bool = False
    cached: bool = False
    tile: str = ""
    streams: bool = False
    step_bytes: int = 0


def available() -> str:
    """Return "" when Triton is installed, else what to do."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install 'edgeformer[gpu]'"
    return ""


def architecture(name: str) -> Architecture:
    """Return the architecture `name`. Raises TargetError for one that Triton kernels do not cover."""
    if name not in ARCHITECTURES:
        raise TargetError(
            f"no Triton kernels for GPU architecture {name!r} (known: {', '.join(ARCHITECTURES)}); "
            "PyTorch's own kernels run there instead"
        )
    return ARCHITECTURES[name]


def is_gpu(target: str) -> bool:
    """Whether a target's name is a GPU of this machine, an architecture, or a known device that is a GPU."""
    found = device(target)
    if found is not None:
        return found.cpu is None
    return target in DEVICES or re.fullmatch(r"gfx[0-9a-f]+|sm_[0-9]+a?", target) is not None


def versions() -> str:
    """Return the tool-chain versions that generated code depends on."""
    import triton

    return f"triton {triton.__version__}"


def compile_kernel(kernel: KernelBuild, arch: str) -> Any:
    """Return Triton's compiled kernel for `arch`, with no device needed. Raises BuildError."""
    if problem := available():
        raise BuildError(problem)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    entry = architecture(arch)
    names = kernel.function.arg_names
    signature = {n: "constexpr" if n in kernel.constants else kernel.signature[n] for n in names}
    attributes = {}
    for i, name in enumerate(names):
        if name not in kernel.constants and (signature[name][0] == "*" or name in kernel.divisible):
            attributes[(i,)] = [["tt.divisibility", 16]]
            if entry.backend == "hip" and signature[name][0] == "*":
                attributes[(i,)].append(["tt.pointer_range", 32])  # buffer loads: tensors of up to 2 GB
    source = ASTSource(
        fn=kernel.function, signature=signature, constexprs=dict(kernel.constants), attrs=attributes
    )
    number: Any = arch if entry.backend == "hip" else int(arch.removeprefix("sm_"))
    target = GPUTarget(entry.backend, number, entry.lanes)
    options = {k: v for k, v in kernel.options.items() if k != "waves_per_eu" or entry.backend == "hip"}
    try:
        return triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})
    except Exception as error:
        reason = f"{error} {error.__cause__ or ''}".strip()
        raise BuildError(f"{kernel.name} for {arch}: {type(error).__name__}: {reason[-400:]}") from error


def inspect(compiled: Any, arch: str) -> Inspection:
    """Return registers, spills, shared memory and what the hot loop holds, read from the machine code."""
    if architecture(arch).backend == "hip":
        return inspect_amd(compiled.asm["amdgcn"], compiled.metadata.shared, compiled.metadata.num_warps)
    return inspect_nvidia(compiled.asm["cubin"], compiled.metadata.shared, compiled.metadata.num_warps)


def build(kernel: KernelBuild, arch: str, folder: Path) -> None:
    """Write `kernel.hsaco` or `kernel.cubin` and `kernel.json` (what a launch needs) into `folder`."""
    compiled, entry = compile_kernel(kernel, arch), architecture(arch)
    kind = "hsaco" if entry.backend == "hip" else "cubin"
    (folder / f"kernel.{kind}").write_bytes(compiled.asm[kind])
    runtime = [n for n in kernel.function.arg_names if n not in kernel.constants]
    metadata = {
        "name": compiled.metadata.name,
        "architecture": arch,
        "binary": f"kernel.{kind}",
        "shared_bytes": compiled.metadata.shared,
        "threads": compiled.metadata.num_warps * entry.lanes,
        "arguments": [[n, kernel.signature[n]] for n in runtime],
        "multiples_of_16": [n for n in runtime if kernel.signature[n][0] == "*" or n in kernel.divisible],
        "hidden_pointers": 2,  # global and profile scratch, null
        "global_scratch_bytes": getattr(compiled.metadata, "global_scratch_size", 0) or 0,
        "constants": {k: str(v) for k, v in kernel.constants.items()},
        "versions": versions(),
    }
    if metadata["global_scratch_bytes"]:
        raise BuildError(
            f"{kernel.name} needs global scratch memory: it cannot be stored, only compiled on use"
        )
    (folder / "kernel.json").write_text(json.dumps(metadata, indent=1))


_SCALARS = {
    "i32": ctypes.c_int32, "u32": ctypes.c_uint32, "i64": ctypes.c_int64, "u64": ctypes.c_uint64,
    "i16": ctypes.c_int16, "i8": ctypes.c_int8, "i1": ctypes.c_int8, "fp32": ctypes.c_float,
    "fp64": ctypes.c_double,
}  # fmt: skip
_LARGE_SHARED = 48 << 10
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class StoredKernel:
    """A stored binary on this machine's GPU, launched through the driver: neither Triton nor a compiler
    runs.
    """

    def __init__(self, folder: Path) -> None:
        self.metadata = json.loads((folder / "kernel.json").read_text())
        self._cuda = self.metadata["binary"].endswith("cubin")
        self._driver = _driver("libcuda.so.1" if self._cuda else "libamdhip64.so")
        self._prefix = "cu" if self._cuda else "hip"
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        if self._cuda:
            self._current_context()
        binary = (folder / self.metadata["binary"]).read_bytes()
        self._call("ModuleLoadData", ctypes.byref(self._module), binary)
        name = self.metadata["name"].encode()
        self._call("ModuleGetFunction", ctypes.byref(self._function), self._module, name)
        if self._cuda and self.metadata["shared_bytes"] > _LARGE_SHARED:
            size = self.metadata["shared_bytes"]
            self._call("FuncSetAttribute", self._function, _MAX_DYNAMIC_SHARED, size)

    def __call__(self, grid: tuple[int, int, int], stream: int, *arguments: Any) -> None:
        """Launch on `stream`: pointers as addresses (tensors of up to 2 GB), in the order of
        metadata["arguments"].

        Raises TypeError for another number of arguments, UnsupportedError where one is no multiple of 16 that
        has to be.
        """
        names, kinds = zip(*self.metadata["arguments"])
        if len(kinds) != len(arguments):
            raise TypeError(f"{self.metadata['name']} takes {len(kinds)} arguments, not {len(arguments)}")
        for name, value in zip(names, arguments):
            if name in self.metadata["multiples_of_16"] and value % 16:
                raise UnsupportedError(f"{self.metadata['name']}: {name}={value} is no multiple of 16")
        values: list[Any] = [
            ctypes.c_void_p(value) if kind[0] == "*" else _SCALARS[kind](value)
            for kind, value in zip(kinds, arguments)
        ]
        values += [ctypes.c_void_p(0)] * self.metadata["hidden_pointers"]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        name = "LaunchKernel" if self._cuda else "ModuleLaunchKernel"
        block = (self.metadata["threads"], 1, 1)
        shared = self.metadata["shared_bytes"]
        self._call(name, self._function, *grid, *block, shared, ctypes.c_void_p(stream), pointers, None)

    def _current_context(self) -> None:
        """Make the first device's primary context current (the one PyTorch uses) where none is yet."""
        current, device = ctypes.c_void_p(), ctypes.c_int()
        self._call("Init", 0)
        self._call("CtxGetCurrent", ctypes.byref(current))
        if not current.value:
            self._call("DeviceGet", ctypes.byref(device), 0)
            self._call("DevicePrimaryCtxRetain", ctypes.byref(current), device)
            self._call("CtxSetCurrent", current)

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._driver, self._prefix + name)(*arguments):
            raise BuildError(f"{self._prefix}{name} of {self.metadata['name']} failed with code {code}")


def load(folder: Path) -> StoredKernel:
    """Load what `build` wrote, on the device. Raises BuildError where there is no driver or it refuses."""
    return StoredKernel(folder)


def _driver(name: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise BuildError(f"no GPU driver: {error}") from error
