"""OpenCL devices: what each allows, asked before anything is launched; no TVM here."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from dataclasses import dataclass
from typing import Any

from ..errors import DeviceError, TargetError
from ..target import Target

WORK_GROUPS = (64, 128, 256)  # classes of devices: kernels are made for one
LOCAL_KIB = (16, 32)
SUBGROUPS = (8, 16, 32, 64)


@dataclass(frozen=True)
class DeviceLimits:
    """What a device says of itself, in work-items and bytes; `subgroup` is its preferred multiple."""

    name: str
    platform: str
    version: str
    driver: str
    kind: str
    work_group: int
    local_bytes: int
    subgroup: int
    compute_units: int
    memory_bytes: int
    allocation_bytes: int
    exact_division: bool

    @property
    def key(self) -> str:
        """One line that names the device and its driver: what a mark is kept for."""
        return f"{self.platform} | {self.name} | {self.version} | {self.driver}"

    def classes(self) -> tuple[int, int, int]:
        """Return the class (work-group, local KiB, subgroup) whose kernels this device can run.

        Raises DeviceError for a device below the smallest.
        """
        if self.work_group < WORK_GROUPS[0] or self.local_bytes < LOCAL_KIB[0] << 10:
            raise DeviceError(
                f"{self.name} allows work-groups of {self.work_group} and {self.local_bytes} bytes of "
                f"local memory; our kernels need {WORK_GROUPS[0]} and {LOCAL_KIB[0] << 10}"
            )
        return (
            max(w for w in WORK_GROUPS if w <= self.work_group),
            max(k for k in LOCAL_KIB if k << 10 <= self.local_bytes),
            max((s for s in SUBGROUPS if s <= self.subgroup), default=SUBGROUPS[0]),
        )


def class_target(work_group: int, local_kib: int, subgroup: int, name: str = "", mcpu: str = "any") -> Target:
    """Return the target of a class of devices: `isa` names the class, which is all that code depends on."""
    isa = f"wg{work_group}.local{local_kib}k.sub{subgroup}"
    return Target(name or f"opencl-{isa}", "opencl", mcpu, isa, backends=("tvm_opencl",), proof="run")


def class_of(target: Target) -> tuple[int, int, int]:
    """Return (work-group, local bytes, subgroup) of an OpenCL target."""
    found = re.fullmatch(r"wg(\d+)\.local(\d+)k\.sub(\d+)", target.isa)
    if target.arch != "opencl" or found is None:
        raise TargetError(f"{target.name} is no OpenCL target")
    work_group, local_kib, subgroup = map(int, found.groups())
    return work_group, local_kib << 10, subgroup


def missing() -> str:
    """Return why no OpenCL device can be used here, or ""."""
    if importlib.util.find_spec("pyopencl") is None:
        return "pyopencl is not installed; pip install 'edgeformer[opencl]'"
    return "" if devices() else _no_driver()


def _no_driver() -> str:
    return (
        "no OpenCL driver offers a device: install the GPU's driver (Mesa rusticl, intel-opencl-icd, ROCm), "
        "or PoCL for the CPU (pip install pocl-binary-distribution, or the package pocl-opencl-icd)"
    )


@functools.cache
def devices() -> tuple[Any, ...]:
    """Return pyopencl's devices, GPUs and accelerators first. An unusable driver counts as none."""
    _keep_caches_ours()
    import pyopencl as cl

    found = []
    try:
        platforms = cl.get_platforms()
    except cl.Error:  # the loader finds no driver
        return ()
    for platform in platforms:
        try:
            found += platform.get_devices()
        except cl.Error:
            continue
    order = {cl.device_type.GPU: 0, cl.device_type.ACCELERATOR: 1}
    return tuple(sorted(found, key=lambda d: order.get(d.type, 2)))


def _keep_caches_ours() -> None:
    """Let PoCL and pyopencl keep compiled kernels in our cache folder, not in the user's home."""
    from ..artifacts import cache_root

    os.environ.setdefault("POCL_CACHE_DIR", str(cache_root() / "pocl"))
    os.environ.setdefault("PYOPENCL_NO_CACHE", "1")


def limits_of(device: Any) -> DeviceLimits:
    """Ask a pyopencl device."""
    import pyopencl as cl

    config = device.single_fp_config
    return DeviceLimits(
        name=device.name.strip(),
        platform=device.platform.name.strip(),
        version=device.version.strip(),
        driver=device.driver_version.strip(),
        kind=cl.device_type.to_string(device.type),
        work_group=min(device.max_work_group_size, device.max_work_item_sizes[0]),
        local_bytes=device.local_mem_size,
        subgroup=_subgroup(device),
        compute_units=device.max_compute_units,
        memory_bytes=device.global_mem_size,
        allocation_bytes=device.max_mem_alloc_size,
        exact_division=bool(config & cl.device_fp_config.CORRECTLY_ROUNDED_DIVIDE_SQRT),
    )


def _subgroup(device: Any) -> int:
    """Return the lanes that run together: the vendor's figure, or the width of a float vector on a CPU."""
    import pyopencl as cl

    for name in ("warp_size_nv", "wavefront_width_amd"):
        try:
            return int(getattr(device, name))
        except (AttributeError, cl.Error):  # another vendor's
            continue
    try:  # Intel: all sizes that a kernel may have
        return max(int(size) for size in device.sub_group_sizes_intel)
    except (AttributeError, cl.Error, ValueError, TypeError):
        pass
    return max(8, int(device.native_vector_width_float))


def parse(name: str) -> int:
    """Return the device's number in a target's name: "opencl" is 0, "opencl:2" is 2. Raises TargetError."""
    found = re.fullmatch(r"opencl(?::(\d+))?", name)
    if found is None:
        raise TargetError(f"Unknown target {name!r}: OpenCL devices are opencl, opencl:0, opencl:1, ...")
    return int(found.group(1) or 0)


def select(name: str = "opencl") -> tuple[Any, DeviceLimits]:
    """Return the pyopencl device of a target's name and its limits. Raises DeviceError with what to do."""
    number = parse(name)
    if reason := missing():
        raise DeviceError(reason)
    found = devices()
    if number >= len(found):
        names = ", ".join(f"opencl:{i} is {d.name.strip()}" for i, d in enumerate(found))
        raise DeviceError(f"there is no OpenCL device {number}; {names}")
    return found[number], limits_of(found[number])


def target(name: str = "opencl") -> Target:
    """Return the target of an OpenCL device that is here: its name, and the class that it falls in."""
    _, limits = select(name)
    slug = re.sub(r"[^A-Za-z0-9]+", "-", limits.name).strip("-").lower()
    return class_target(*limits.classes(), name=name, mcpu=slug)
