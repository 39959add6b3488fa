"""TVM's OpenCL code generator: PrimFuncs to OpenCL C, launched by pyopencl (no TVM at run time).

The same PrimFuncs give Metal and WebGPU source (`generate` with another language); those are never run here.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..artifacts import cache_root
from ..errors import BuildError, DeviceError
from .opencl_device import DeviceLimits

SOURCE_NAME, FACTS_NAME = "kernels.cl", "kernels.json"
LANGUAGES = ("opencl", "metal", "webgpu")
_PRELUDES = {
    "opencl": """inline float ef_half(uint bits) {
  ushort h = (ushort)bits;
  return vload_half(0, (const half*)&h);
}
inline uint ef_to_half(float value) {
  ushort h;
  vstore_half_rte(value, 0, (half*)&h);
  return h;
}
""",
    "metal": """#include <metal_stdlib>
inline float ef_half(uint bits) { return float(as_type<half>(ushort(bits))); }
inline uint ef_to_half(float value) { return as_type<ushort>(half(value)); }
""",
    "webgpu": """fn ef_half(bits: u32) -> f32 { return unpack2x16float(bits).x; }
fn ef_to_half(value: f32) -> u32 { return pack2x16float(vec2<f32>(value, 0.0)) & 0xffffu; }
""",
}
_TYPE_BYTES = {"float4": 16, "uint4": 16, "int4": 16, "float": 4, "uint": 4, "int": 4, "ulong": 8, "long": 8}


@dataclass(frozen=True)
class KernelFacts:
    """What a launch needs of a kernel, and what its source shows.

    `arguments` are (name, type) in order, a type "*" for a buffer. `private_arrays` counts arrays of more
    than one element, which would need private memory.
    """

    name: str
    arguments: tuple[tuple[str, str], ...]
    work_group: int
    local_bytes: int
    private_arrays: int


def available() -> str | None:
    """Return None when this back end can build here, else the reason."""
    from . import tvm_llvm

    return tvm_llvm.available()


def versions() -> str:
    """Return the tool versions that belong into an artifact's key. Raises BuildError when one is missing."""
    try:
        return f"apache-tvm={importlib.metadata.version('apache-tvm')}"
    except importlib.metadata.PackageNotFoundError as error:
        raise BuildError(available()) from error


def generate(functions: Sequence[Any], language: str = "opencl") -> str:
    """Return the source of PrimFuncs in a language of LANGUAGES. Raises BuildError."""
    if problem := available():
        raise BuildError(problem)
    import tvm

    module = tvm.IRModule({str(f.attrs["global_symbol"]): f for f in functions})
    options = {"kind": language, "max_num_threads": 256, "host": {"kind": "llvm"}}
    if language == "metal":
        del options["max_num_threads"]
    try:
        built = tvm.compile(module, tvm.target.Target(options), tir_pipeline=_pipeline())
    except Exception as error:
        raise BuildError(f"TVM could not generate {language}: {str(error).strip()[-600:]}") from error
    text = str(built.mod.imports[0].inspect_source())
    if language == "opencl":
        # TVM writes vectors of scalars as in C++; OpenCL C has a cast before the list.
        text = re.sub(r"(?<!\w)((?:float|uint|int)[24])\(", r"(\1)(", text)
        for function in functions:
            name, lanes = f"{function.attrs['global_symbol']}_kernel", int(function.attrs["lanes"])
            size = f"__attribute__((reqd_work_group_size({lanes}, 1, 1))) "
            text = text.replace(f"__kernel void {name}(", f"__kernel {size}void {name}(")
    return _PRELUDES[language] + text


@functools.cache
def _pipeline() -> str:
    """Register and name the passes that our kernels need.

    They are emitted in their final shape, barriers included; TVM's simplifier would copy bound values into
    every use, and its thread synchronisation would add barriers.
    """
    import tvm
    from tvm import s_tir, tirx
    from tvm.tirx import compilation_pipeline

    passes = [
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.VectorizeLoop(True),
        tirx.transform.UnrollLoop(),
        tirx.transform.AnnotateEntryFunc(),
        tirx.transform.SplitHostDevice(),
        tirx.transform.MakePackedAPI(),
    ]

    @tvm.transform.module_pass(opt_level=0)
    def lower(module: Any, context: Any) -> Any:
        return tvm.ir.transform.Sequential(passes)(module)

    host = tvm.ir.transform.Sequential([tirx.transform.LowerTVMBuiltin(), tirx.transform.LowerIntrin()])
    device = tvm.ir.transform.Sequential([tirx.transform.LowerWarpMemory(), tirx.transform.LowerIntrin()])
    name = "edgeformer_device"
    compilation_pipeline.register_tir_pipeline(name, lambda: (lower, lambda: host, lambda: device))
    return name


def inspect(source: str) -> list[KernelFacts]:
    """Read every kernel of generated OpenCL C."""
    found = []
    pattern = (
        r"__kernel __attribute__\(\(reqd_work_group_size\((\d+), 1, 1\)\)\) void (\w+)_kernel\(([^)]*)\) \{"
    )
    starts = list(re.finditer(pattern, source))
    for i, match in enumerate(starts):
        body = source[match.end() : starts[i + 1].start() if i + 1 < len(starts) else len(source)]
        arrays = re.findall(r"^\s*(__local )?(\w+) \w+\[(\d+)\];", body, re.MULTILINE)
        local = sum(_TYPE_BYTES[kind] * int(size) for where, kind, size in arrays if where)
        private = sum(int(size) > 1 for where, _, size in arrays if not where)
        facts = (match.group(2), _arguments(match.group(3)), int(match.group(1)), local, private)
        found.append(KernelFacts(*facts))
    return found


def _arguments(text: str) -> tuple[tuple[str, str], ...]:
    found = []
    for part in text.split(","):
        words = part.split()
        if not words:
            continue
        buffer = "*" in part
        found.append((words[-1].removesuffix("_ptr") if buffer else words[-1], "*" if buffer else words[-2]))
    return tuple(found)


def build(functions: Sequence[Any], folder: Path) -> None:
    """Write `kernels.cl` and what launches need of it into `folder`. Raises BuildError."""
    source = generate(functions)
    (folder / SOURCE_NAME).write_text(source)
    facts = [asdict(f) for f in inspect(source)]
    if {f["name"] for f in facts} != {str(f.attrs["global_symbol"]) for f in functions}:
        raise BuildError(f"TVM's OpenCL source lacks kernels: {[f['name'] for f in facts]}")
    (folder / FACTS_NAME).write_text(json.dumps(facts))


class Program:
    """A built program on a device: kernels by name, launched on one in-order queue."""

    def __init__(self, folder: Path, context: Any, queue: Any, limits: DeviceLimits) -> None:
        import pyopencl as cl

        self.source = (folder / SOURCE_NAME).read_text()
        self.facts = {
            row["name"]: KernelFacts(
                row["name"],
                tuple((a, b) for a, b in row["arguments"]),
                row["work_group"],
                row["local_bytes"],
                row["private_arrays"],
            )
            for row in json.loads((folder / FACTS_NAME).read_text())
        }
        self._queue = queue
        self.limits = limits
        for facts in self.facts.values():
            require_limits(facts, limits)
        options = ["-cl-fp32-correctly-rounded-divide-sqrt"] if limits.exact_division else []
        cache = str(cache_root() / "opencl-binaries")
        try:
            self._program = cl.Program(context, self.source).build(options=options, cache_dir=cache)
        except cl.Error as error:
            raise BuildError(
                f"{limits.name}'s OpenCL compiler failed: {str(error).strip()[-600:]}"
            ) from error
        self._kernels: dict[str, Kernel] = {}

    def function(self, name: str) -> Kernel:
        """Return the kernel `name`; its limits on this device are asked once, before it is launched."""
        if name not in self._kernels:
            self._kernels[name] = Kernel(self._program, self.facts[name], self._queue, self.limits)
        return self._kernels[name]


def require_limits(facts: KernelFacts, limits: DeviceLimits) -> None:
    """Raise DeviceError for a kernel that is larger than the device allows."""
    if facts.work_group > limits.work_group or facts.local_bytes > limits.local_bytes:
        raise DeviceError(
            f"{facts.name} takes work-groups of {facts.work_group} and {facts.local_bytes} bytes of local "
            f"memory; {limits.name} allows {limits.work_group} and {limits.local_bytes}"
        )


class Kernel:
    """One kernel: `kernel(grid, **arguments)` enqueues grid work-groups and returns at once."""

    def __init__(self, program: Any, facts: KernelFacts, queue: Any, limits: DeviceLimits) -> None:
        import numpy as np
        import pyopencl as cl

        self.facts = facts
        self._queue, self._errors, self._device = queue, cl.Error, limits.name
        self._kernel = cl.Kernel(program, f"{facts.name}_kernel")
        types = {"int": np.int32, "uint": np.uint32, "float": np.float32, "*": None}
        self._kernel.set_scalar_arg_dtypes([types[kind] for _, kind in facts.arguments])
        self._names = [name for name, _ in facts.arguments]
        ask = lambda what: self._kernel.get_work_group_info(what, queue.device)  # noqa: E731
        self.most = int(ask(cl.kernel_work_group_info.WORK_GROUP_SIZE))
        self.private_bytes = int(ask(cl.kernel_work_group_info.PRIVATE_MEM_SIZE))
        if self.most < facts.work_group:
            raise DeviceError(
                f"{limits.name} runs {facts.name} in work-groups of at most {self.most} (registers), "
                f"not {facts.work_group}; take a smaller class of device"
            )

    def __call__(self, grid: tuple[int, ...], **arguments: Any) -> None:
        """Enqueue; buffers are cl.Buffer, scalars numbers. Raises DeviceError when the device is gone."""
        x, y = (*grid, 1)[:2]
        lanes = self.facts.work_group
        if min(x, y) < 1:
            return
        arguments |= {"grid_x": x, "grid_y": y}
        try:
            self._kernel(self._queue, (x * lanes, y), (lanes, 1), *(arguments[name] for name in self._names))
        except self._errors as error:
            raise DeviceError(f"{self._device} did not take {self.facts.name}: {error}") from error
