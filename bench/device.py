"""What a measurement ran on: the device, its limits on memory and cores, and the versions of the tools."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Any

from ..compiler.backends import tvm_llvm
from ..compiler.target import available_cores, available_memory, detect, matrix_unit

TOOLS = (
    "edgeformer",
    "torch",
    "apache-tvm",
    "apache-tvm-ffi",
    "numpy",
    "tokenizers",
    "gguf",
    "triton",
    "onnxruntime",
)


def version_of(package: str) -> str | None:
    """Return the installed version of a package, None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Return the versions of this interpreter and of the installed tools that can change a result."""
    found = {name: version_of(name) for name in TOOLS}
    return {"python": platform.python_version()} | {name: v for name, v in found.items() if v}


@functools.cache
def device() -> dict[str, Any]:
    """Return this machine as data: CPU, instruction set, cores that this process may use, bytes of memory."""
    import psutil

    target = detect()
    return {
        "cpu": _cpu_name(),
        "target": target.name,
        "arch": target.arch,
        "isa": target.isa,
        "matrix_unit": matrix_unit(),
        "features": sorted(target.features),
        "cores": available_cores(),
        "l2_bytes": target.l2,
        "l3_bytes": target.l3,
        "memory_bytes": psutil.virtual_memory().total,
        "os": platform.platform(terse=True),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith(("model name", "Model", "Hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def back_ends() -> dict[str, str]:
    """Return each back end with "available" or the reason why not; starts none of them."""
    found = {"torch": "available", "tvm_llvm": tvm_llvm.available() or "available"}
    for name, package, extra in (("triton_gpu", "triton", "gpu"), ("onnx_graph", "onnxruntime", "onnx")):
        missing = version_of(package) is None
        found[name] = (
            f"not installed: pip install 'edgeformer[{extra}]'" if missing else "no form uses it yet"
        )
    return found


def linker() -> str:
    """Return the command that links kernels here, or what to do where there is none."""
    command = tvm_llvm.linker(detect())
    if command is None:
        return "none: kernels are rebuilt in every process; install gcc or clang, or `pip install ziglang`"
    return " ".join(command)


def free_memory() -> int:
    """Return the bytes that this process may still allocate."""
    return available_memory()


def peak_memory() -> int | None:
    """Return the most bytes that this process has had in memory, None where the system does not tell."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
