"""What a measurement ran on: the device, its limits on memory and cores, and the versions of the tools."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

from ..compiler.backends import opencl_device, triton_gpu, tvm_llvm, tvm_opencl
from ..compiler.target import available_cores, available_memory, detect, matrix_unit

TOOLS = (
    "edgeformer",
    "torch",
    "apache-tvm",
    "apache-tvm-ffi",
    "numpy",
    "tokenizers",
    "safetensors",
    "transformers",
    "gguf",
    "triton",
    "onnxruntime",
    "onnxruntime-genai",
    "openvino",
    "openvino-genai",
    "llama-cpp-python",
    "torchao",
    "accelerate",
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
    found["tvm_opencl"] = opencl_device.missing() or tvm_opencl.available() or "available"
    gpu = cuda()
    found["triton_gpu"] = triton_gpu.available() or (f"GPU: {gpu}" if gpu.startswith("none") else "available")
    missing = version_of("onnxruntime") is None
    found["onnx_graph"] = "not installed: pip install 'edgeformer[onnx]'" if missing else "available"
    return found


def limits() -> dict[str, Any]:
    """Return what this process may use less than the machine has: cgroup and affinity; {} where nothing."""
    found: dict[str, Any] = {}
    for key, name in (("cgroup_memory", "memory.max"), ("cgroup_cpu", "cpu.max")):
        path = Path("/sys/fs/cgroup") / name
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        found[key] = text if not text.startswith("max") else "none"
    if hasattr(os, "sched_getaffinity"):
        found["affinity"] = sorted(os.sched_getaffinity(0))
    return found


THREAD_VARIABLES = ("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_WAIT_POLICY", "GOMP_CPU_AFFINITY",
                    "MKL_NUM_THREADS",
                    "KMP_AFFINITY", "TVM_NUM_THREADS", "TVM_BIND_THREADS")  # fmt: skip


def thread_settings() -> dict[str, Any]:
    """Return the threads that a model uses by default, and the variables that change that."""
    found: dict[str, Any] = {"default": available_cores(), "logical": os.cpu_count()}
    return found | {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}


def warnings_of(found: dict[str, str]) -> list[str]:
    """Return what is known to be wrong with these versions."""
    problems = []
    if "apache-tvm-ffi" in found and (problem := tvm_llvm.ffi_problem(found["apache-tvm-ffi"])):
        problems.append(problem)
    if _before(found.get("torch", "99"), (2, 11)):
        problems.append(f"torch {found['torch']} is older than 2.11; pip install -U torch")
    if _before(found.get("triton", "99"), (3, 5)):
        problems.append(f"triton {found['triton']} is older than 3.5; pip install -U triton")
    return problems


def _before(version: str, least: tuple[int, int]) -> bool:
    numbers = [int(word) for word in re.findall(r"\d+", version)[:2]]
    return tuple(numbers) < least


def cuda() -> str:
    """Return the GPUs that torch sees, or why it sees none."""
    import torch

    if not torch.backends.cuda.is_built():
        return f"none: torch {torch.__version__} is a CPU build"
    if not torch.cuda.is_available():
        return "none: torch was built for GPUs and finds none (driver?)"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names)


def opencl() -> str:
    """Return the OpenCL devices and what they were found to be, or why there is none."""
    from ..runtime.opencl import marks

    if reason := opencl_device.missing():
        return f"none: {reason}"
    found, known = [], marks()
    for i, device in enumerate(opencl_device.devices()):
        limits = opencl_device.limits_of(device)
        wrong = sum(result != "right" for result in known.get(limits.key, {}).values())
        state = f"; {wrong} KERNELS WRONG" if wrong else ""
        found.append(
            f"opencl:{i} {limits.name} ({limits.platform}, driver {limits.driver}; "
            f"work-group {limits.work_group}, "
            f"local {limits.local_bytes >> 10} KiB, subgroup {limits.subgroup}{state})"
        )
    return ", ".join(found)


def cache_state() -> str:
    """Return where built kernels are kept, how many, and whether that can be written."""
    from ..compiler.artifacts import ArtifactStore

    store = ArtifactStore()
    root = store.root if store.root.exists() else next(p for p in store.root.parents if p.exists())
    count = sum(1 for _ in store.entries())
    writable = (
        "" if os.access(root, os.W_OK) else "; it cannot be written, so kernels are built in every process"
    )
    return f"{store.root} ({count} kernels{writable})"


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
