"""A Target says what code is compiled for; it is frozen, and detected or parsed, never probed at import."""

from __future__ import annotations

import ctypes
import difflib
import functools
import os
import platform
import sys
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from .errors import TargetError, UnsupportedError

# LLVM's CPU names by archspec's micro-architecture names, where they differ.
_LLVM_NAME = {
    "zen": "znver1",
    "zen2": "znver2",
    "zen3": "znver3",
    "zen4": "znver4",
    "zen5": "znver5",
    "skylake_avx512": "skylake-avx512",
    "x86_64": "x86-64",
    "x86_64_v2": "x86-64-v2",
    "x86_64_v3": "x86-64-v3",
    "x86_64_v4": "x86-64-v4",
    "icelake": "icelake-client",
    "mic_knl": "knl",
    "k10": "amdfam10",
    "bulldozer": "bdver1",
    "piledriver": "bdver2",
    "steamroller": "bdver3",
    "excavator": "bdver4",
    "zen6": "znver5",
    "aarch64": "generic",
    "thunderx2": "thunderx2t99",
    "neoverse_n1": "neoverse-n1",
    "neoverse_n2": "neoverse-n2",
    "neoverse_v1": "neoverse-v1",
    "neoverse_v2": "neoverse-v2",
    "m1": "apple-a14",
    "m2": "apple-a15",
    "m3": "apple-a16",
    "m4": "apple-m4",
}

# The features that choose an instruction-set entry; the first whose features are all there wins.
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
_AVX512_VNNI = _AVX512 | {"avx512_vnni", "f16c", "fma"}
# Instructions of operating systems and drivers: hypervisors hide them, and no kernel contains them.
_SYSTEM = frozenset({"cldemote", "flush_l1d", "movdir64b", "movdiri", "pku", "serialize", "waitpkg"})
_AMX = frozenset({"amx_tile", "amx_int8", "amx_bf16", "avx512_bf16"})
_AVX2 = frozenset({"avx2", "fma", "f16c"})
_DOTPROD = frozenset({"asimd", "asimddp"})
_I8MM = _DOTPROD | {"i8mm"}
ISA_FEATURES = (
    ("amx", _AVX512_VNNI | _AMX),
    ("avx512_vnni", _AVX512_VNNI),
    ("avx512", _AVX512 | _AVX2),
    ("avx_vnni", _AVX2 | {"avx_vnni"}),
    ("avx2", _AVX2),
    ("i8mm", _I8MM),
    ("dotprod", _DOTPROD),
    ("neon", frozenset({"asimd"})),
    ("portable", frozenset()),
)


# How far the kernels of a target were checked, the strongest first.
PROOFS = {
    "run": "timed on such a CPU",
    "emulated": "right under an emulator, or on another CPU that has its instructions",
    "compiled": "built, its assembly checked",
    "described": "data only",
}

# arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) on x86-64 Linux.
_ARCH_PRCTL, _REQUEST_STATE, _TILE_DATA = 158, 0x1023, 18

# Arm Linux: bits of the auxiliary vector's entries AT_HWCAP (16) and AT_HWCAP2 (26).
_HWCAPS = {
    16: {"asimd": 1 << 1, "asimdhp": 1 << 10, "asimddp": 1 << 20, "sve": 1 << 22},
    26: {"sve2": 1 << 1, "i8mm": 1 << 13, "bf16": 1 << 14},
}


@dataclass(frozen=True)
class Target:
    """A device and its instruction set.

    Sizes are in bytes; `cores` counts the physical cores that this process may use. `features` are
    Linux cpuinfo names. `proof` says how far kernels for it were checked (see PROOFS).
    """

    name: str
    arch: str
    mcpu: str
    isa: str
    features: frozenset[str] = frozenset()
    cores: int = 1
    l1d: int = 32 << 10
    l2: int = 512 << 10
    l3: int = 0
    backends: tuple[str, ...] = ("tvm_llvm", "torch")
    proof: str = "run"

    @staticmethod
    def parse(name: str | Target) -> Target:
        """Return the target `name`: "auto" (this host), "opencl" (the first OpenCL device; "opencl:1"), a
        target's or device's name, or a Target.

        Raises TargetError with close names for an unknown one, DeviceError without such a device.
        """
        if isinstance(name, Target):
            return name
        if name in ("auto", "host"):
            return detect()
        if name == "directml":
            raise TargetError(
                "directml runs folders: `edgeformer compile --target directml MODEL -o FOLDER`, then "
                "`edgeformer run FOLDER`"
            )
        if name == "opencl" or name.startswith("opencl:"):
            from .backends import opencl_device

            return opencl_device.target(name)
        known = _known()
        if name not in known:
            if (found := _of_device(name)) is not None:
                return found
            names = sorted({*known, *_device_names(), "auto"})  # some targets are named as their device
            close = difflib.get_close_matches(name, names, n=3)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise TargetError(f"Unknown target {name!r}.{hint} `edgeformer targets` lists all names.")
        return known[name]

    def key(self) -> str:
        """One line with all that changes generated code."""
        return f"{self.arch}/{self.mcpu}/{self.isa}"

    def with_isa(self, isa: str) -> Target:
        """Return this target restricted to another instruction-set entry (tests, comparisons)."""
        return replace(self, isa=isa, name=f"{self.name}+{isa}")

    def missing_on(self, host: Target) -> list[str]:
        """Return what `host` lacks to run code for this target; an empty list means it can run."""
        if self.arch == "opencl":  # a device of its own: it was asked when the target was made
            return []
        if self.arch != host.arch:
            return [f"architecture {self.arch}"]
        return sorted(self.features - host.features)

    def require_cpu(self, what: str) -> None:
        """Raise UnsupportedError for a target that is no CPU, where `what` is built for CPUs alone."""
        if "tvm_llvm" not in self.backends:
            raise UnsupportedError(f"{what} {self.name}: only CPU targets can be; `edgeformer run` takes it")

    def require_runnable(self) -> None:
        """Raise TargetError when this host cannot run code for this target."""
        missing = self.missing_on(detect())
        if missing:
            raise TargetError(
                f"Target {self.name} needs {', '.join(missing)}, which this host ({detect().name}) lacks. "
                "Use --target auto, or compile on this host and run on the device."
            )


def known_targets() -> list[str]:
    """Return the names of the targets that ship as data."""
    return sorted(_known())


def parse_target_file(entry: Any) -> dict[str, Any]:
    """Return the values of a file in `targets`."""
    import yaml

    return yaml.safe_load(entry.read_text(encoding="utf-8"))


def _device_names() -> list[str]:
    from .devices import known_devices

    return [device.name for device in known_devices()]


def _of_device(name: str) -> Target | None:
    """Return the target of a device's CPU, None where no device has this name."""
    from .devices import device

    found = device(name)
    if found is None:
        return None
    target = found.target()
    if target is None:
        raise TargetError(
            f"{found.title} is a GPU; what runs on it there is {', '.join(found.backends)}, and code for its "
            "host's CPU is compiled for that CPU. `edgeformer targets` lists all names."
        )
    return target


@functools.cache
def _known() -> dict[str, Target]:
    found: dict[str, Target] = {}
    folder = resources.files(__package__ or "") / "targets"
    for entry in folder.iterdir():
        if entry.name.endswith(".yaml"):
            data = parse_target_file(entry)
            features = frozenset(data["features"])
            found[data["name"]] = Target(
                name=data["name"],
                arch=data["arch"],
                mcpu=data["mcpu"],
                isa=_isa_for(features),
                features=features,
                cores=data.get("cores", 1),
                l1d=data.get("l1d", 32 << 10),
                l2=data.get("l2", 512 << 10),
                l3=data.get("l3", 0),
                backends=tuple(data.get("backends", ("tvm_llvm", "torch"))),
                proof=data["proof"],
            )
    return found


def _isa_for(features: frozenset[str]) -> str:
    return next(isa for isa, needed in ISA_FEATURES if needed <= features)


def _llvm_name(name: str) -> str:
    """Return LLVM's CPU name for archspec's; architecture levels of Arm are features, not CPUs."""
    return _LLVM_NAME.get(name) or ("generic" if name.startswith("armv") else name.replace("_", "-"))


def _micro_architecture() -> str:
    """Return archspec's name of this host, or of a newer CPU of which only system instructions are hidden."""
    import archspec.cpu

    host, seen = archspec.cpu.host(), archspec.cpu.detect.detected_info()
    newer = (
        micro
        for micro in archspec.cpu.TARGETS.values()
        if micro.vendor == seen.vendor
        and host in micro.ancestors
        and frozenset() < micro.features - seen.features <= _SYSTEM
    )
    return max(newer, key=lambda micro: len(micro.ancestors), default=host).name


@functools.cache
def detect() -> Target:
    """Return this host's target (archspec, psutil; the process's affinity and cgroup limit respected)."""
    import archspec.cpu

    host = archspec.cpu.host()
    arch = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    # A virtual machine may hide a feature, so that archspec takes an older CPU with fewer features.
    features = frozenset(host.features) | _cpu_features()
    name = _micro_architecture()
    if features >= _AMX:
        if amx_refused():
            features -= {f for f in features if f.startswith("amx")}
        elif "sapphirerapids" not in {name, *(a.name for a in host.ancestors)}:
            name = "sapphirerapids"  # the first CPU with AMX
    sizes = _cache_sizes()
    return Target(
        name=f"host-{name}",
        arch=arch,
        mcpu=_llvm_name(name),
        isa=_isa_for(features),
        features=features,
        cores=available_cores(),
        l1d=sizes.get((1, "Data"), 32 << 10),
        l2=sizes.get((2, "Unified"), 512 << 10),
        l3=sizes.get((3, "Unified"), 0),
    )


def _cpu_features() -> frozenset[str]:
    """Return the features of cpuinfo; of Arm also those that the kernel names, which qemu does right."""
    import archspec.cpu

    found = frozenset(archspec.cpu.detect.detected_info().features)
    if sys.platform != "linux" or platform.machine() != "aarch64":
        return found
    ask = ctypes.CDLL(None).getauxval
    ask.argtypes, ask.restype = [ctypes.c_ulong], ctypes.c_ulong
    return found | {name for entry, bits in _HWCAPS.items() for name, bit in bits.items() if ask(entry) & bit}


@functools.cache
def amx_refused() -> str:
    """Ask the kernel for AMX's tile registers, once a process; return why they cannot be used, or ""."""
    if sys.platform != "linux":
        return "tile registers are asked for on Linux only"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_ARCH_PRCTL, _REQUEST_STATE, _TILE_DATA) == 0:
        return ""
    return f"the kernel refuses tile registers: {os.strerror(ctypes.get_errno())}"


def matrix_unit() -> str:
    """Return this host's matrix unit, "none", or why one that the CPU has is not used."""
    if detect().isa == "amx":
        return "amx"
    return amx_refused() if _cpu_features() >= _AMX else "none"


def available_cores() -> int:
    """Return the physical cores that this process may use: affinity and the cgroup's CPU quota respected."""
    import psutil

    affinity = getattr(os, "sched_getaffinity", None)
    logical = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    all_logical, physical = os.cpu_count() or 1, psutil.cpu_count(logical=False) or logical
    cores = max(1, min(logical, -(-logical * physical // all_logical)))
    quota = _cgroup_numbers("cpu.max")
    if len(quota) == 2:
        cores = min(cores, max(1, quota[0] // quota[1]))
    return cores


def available_memory() -> int:
    """Return the bytes that this process may still allocate: free memory, capped by the cgroup's limit."""
    import psutil

    free = psutil.virtual_memory().available
    limit, used = _cgroup_numbers("memory.max"), _cgroup_numbers("memory.current")
    if limit and used:
        free = min(free, max(0, limit[0] - used[0] + _reclaimable()))
    return free


def _cgroup_numbers(name: str) -> list[int]:
    try:
        text = (Path("/sys/fs/cgroup") / name).read_text().split()
        return [int(word) for word in text]
    except (OSError, ValueError):  # no cgroup v2 here, or "max": no limit
        return []


def _reclaimable() -> int:
    """Return the bytes of page cache that count as used by the cgroup but are given back when asked for."""
    try:
        lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    except (OSError, ValueError, IndexError):
        return 0


def _cache_sizes() -> dict[tuple[int, str], int]:
    sizes: dict[tuple[int, str], int] = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level, kind = int((index / "level").read_text()), (index / "type").read_text().strip()
            text = (index / "size").read_text().strip()
        except (OSError, ValueError):
            continue
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1)
        sizes[level, kind] = int(text.rstrip("KM")) * unit
    return sizes
