"""Device profiles (targets/devices/*.yaml): what a device has, every figure with where it was published.

A profile names the target that its CPU's code is compiled for, its cores (big and little apart), caches,
memory and GPU, its back ends in the order in which they are worth trying, and how far each part was checked.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from importlib import resources
from typing import Any

from .target import Target, parse_target_file

BACKENDS = {
    "tvm_llvm": "the CPU's kernels",
    "triton": "a GPU's kernels, where its driver has a Triton back end",
    "opencl": "a GPU's kernels through OpenCL",
    "directml": "a GPU on Windows, through ONNX Runtime",
    "torch": "plain PyTorch",
}


@dataclass(frozen=True)
class Proof:
    """How far a part was checked (a level of ``target.PROOFS``), when, and the command that shows it."""

    level: str
    date: str
    command: str


@dataclass(frozen=True)
class Cores:
    """Cores of one kind: their number, threads, highest clock, and caches in bytes.

    ``l2`` is what ``l2_shared_by`` cores share. ``sources`` are keys of the profile's.
    """

    name: str
    count: int
    threads: int
    mhz: int
    l1d: int
    l2: int
    l2_shared_by: int
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Cpu:
    """A device's CPU; ``target`` names the target that it runs code for, ``mcpu`` is LLVM's own name."""

    target: str
    mcpu: str
    cores: tuple[Cores, ...]
    l3: int
    proof: Proof


@dataclass(frozen=True)
class Gpu:
    """A device's GPU: its tool chains' name for it, its units and its last cache in bytes (0: not known)."""

    name: str
    arch: str
    units: int
    unit: str
    l2: int
    proof: Proof


@dataclass(frozen=True)
class Device:
    """A device; ``bandwidth`` is its memory's peak in bytes a second, ``memory_bytes`` 0 where it varies."""

    name: str
    title: str
    cpu: Cpu | None
    gpu: Gpu | None
    memory: str
    memory_bits: int
    memory_bytes: int
    bandwidth: int
    backends: tuple[str, ...]
    sources: dict[str, str]

    def proofs(self) -> list[tuple[str, Proof]]:
        """(part, proof) of the CPU and the GPU."""
        parts = (("CPU", self.cpu), ("GPU", self.gpu))
        return [(name, part.proof) for name, part in parts if part is not None]

    def target(self) -> Target | None:
        """The target of the CPU: its base's code, with this device's cores and caches; None without a CPU.

        Cores of every kind count; the caches are those of the first, the fastest kind.
        """
        if self.cpu is None:
            return None
        base, first = Target.parse(self.cpu.target), self.cpu.cores[0]
        return dataclasses.replace(
            base, name=self.name, mcpu=self.cpu.mcpu or base.mcpu, l1d=first.l1d, l2=first.l2, l3=self.cpu.l3,
            cores=sum(cores.count for cores in self.cpu.cores), proof=self.cpu.proof.level,
        )  # fmt: skip


def known_devices() -> list[Device]:
    """Return the devices that ship as data, by name."""
    return [_known()[name] for name in sorted(_known())]


def device(name: str) -> Device | None:
    """Return the device of a name, None where there is none."""
    return _known().get(name)


@functools.cache
def _known() -> dict[str, Device]:
    folder = resources.files(__package__ or "") / "targets" / "devices"
    found = [_device(parse_target_file(e)) for e in folder.iterdir() if e.name.endswith(".yaml")]
    return {one.name: one for one in found}


def _device(data: dict[str, Any]) -> Device:
    memory = data["memory"]
    return Device(
        name=data["name"],
        title=data["device"],
        cpu=_cpu(data["cpu"]) if "cpu" in data else None,
        gpu=_gpu(data["gpu"]) if "gpu" in data else None,
        memory=memory["type"],
        memory_bits=memory["bits"],
        memory_bytes=memory.get("bytes", 0),
        bandwidth=memory["bytes_per_second"],
        backends=tuple(data["backends"]),
        sources=dict(data["sources"]),
    )


def _proof(data: dict[str, Any]) -> Proof:
    return Proof(data["level"], str(data["date"]), data["command"])


def _cpu(data: dict[str, Any]) -> Cpu:
    cores = tuple(
        Cores(**{k: v for k, v in row.items() if k != "from"}, sources=tuple(row["from"]))
        for row in data["cores"]
    )
    l3 = data.get("l3", {}).get("bytes", 0)
    return Cpu(data["target"], data.get("mcpu", ""), cores, l3, _proof(data["proof"]))


def _gpu(data: dict[str, Any]) -> Gpu:
    units = data["units"]
    l2 = data.get("l2", {}).get("bytes", 0)
    return Gpu(data["name"], data["arch"], units["count"], units["of"], l2, _proof(data["proof"]))
