"""What a GPU kernel's machine code promises without a device: rules that it keeps, and a cost to rank it by.

The cost is a model, never a speed: cycles of a compute unit for a unit of work in the hot loop, as the
longest of issue, memory and shared memory, or the latency that the resident waves leave uncovered.
"""

from __future__ import annotations

from dataclasses import dataclass

from .triton_gpu import Architecture, KernelBuild
from .triton_inspect import Inspection

_LATENCY = 700.0  # cycles until a load from memory arrives
_CACHE_BYTES = 64.0  # a cycle and compute unit out of the second-level cache
_SHARED_BYTES = 128.0  # a cycle and compute unit out of shared memory
_SHARED_WIDTH = 8.0  # bytes a lane of an average access
_SCRATCH_CYCLES = 40.0
BROKEN = 1000.0  # what a broken rule multiplies a cost by: it loses to whatever keeps them


@dataclass(frozen=True)
class _Unit:
    """A compute unit: its SIMDs, registers a lane of each and their granule, most waves of a SIMD, fp16
    products of its matrix unit a cycle, cycles of a vector instruction; bytes of memory a cycle; shared bytes
    of the unit.
    """

    simds: int
    registers: int
    granule: int
    waves: int
    products: float
    vector: float
    memory: float
    shared: int


# Products and memory: published peaks over compute units and clock.
_UNITS = {
    "gfx90a": _Unit(4, 512, 8, 8, 128, 4, 9.0, 64 << 10),
    "gfx942": _Unit(4, 512, 8, 8, 256, 4, 8.3, 64 << 10),
    "gfx1100": _Unit(2, 1536, 24, 16, 128, 1, 4.3, 64 << 10),
    "gfx1103": _Unit(2, 1024, 16, 16, 128, 1, 3.7, 64 << 10),
    "gfx1151": _Unit(2, 1536, 24, 16, 128, 1, 2.2, 64 << 10),
    "gfx1201": _Unit(2, 1536, 24, 16, 256, 1, 3.4, 64 << 10),
    "sm_80": _Unit(4, 512, 8, 16, 256, 1, 10.0, 164 << 10),
    "sm_89": _Unit(4, 512, 8, 12, 128, 1, 3.2, 100 << 10),
    "sm_90": _Unit(4, 512, 8, 16, 512, 1, 20.7, 228 << 10),
}


def problems(kernel: KernelBuild, arch: Architecture, found: Inspection) -> list[str]:
    """Return which rules the machine code breaks."""
    wrong = []
    if kernel.contracting and not found.matrix:
        wrong.append("no matrix instruction in the hot loop")
    if found.scratch:
        wrong.append(f"{found.scratch} scratch accesses in the hot loop")
    widest = max(found.loads, default=16)
    if (widest if kernel.cached else found.load_bytes or 16) < 8:
        wrong.append(f"most bytes come in loads of {found.load_bytes} a lane, the widest has {widest}")
    if found.shared_bytes > arch.shared_bytes:
        wrong.append(f"{found.shared_bytes} bytes of shared memory, {arch.shared_bytes} are there")
    return wrong


def resident_waves(arch: Architecture, found: Inspection) -> float:
    """Return how many waves of a kernel fit on one SIMD: registers, shared memory, the unit's own limit."""
    unit = _UNITS[arch.name]
    used = max(-(-found.registers // unit.granule) * unit.granule, unit.granule)
    groups = min(unit.waves, unit.registers // used) * unit.simds // found.warps
    if found.shared_bytes:
        groups = min(groups, unit.shared // found.shared_bytes)
    return max(groups, 0) * found.warps / unit.simds


def cost(kernel: KernelBuild, arch: Architecture, found: Inspection) -> float:
    """Return the model's cycles of a compute unit for a unit of work; what breaks a rule costs BROKEN times.

    A unit of work is a product of the matrix instructions, or a byte of the stream where nothing contracts.
    """
    unit, kinds = _UNITS[arch.name], found.kinds
    issue = found.products / unit.products + kinds.get("valu", 0) * unit.vector
    issue += found.scratch * _SCRATCH_CYCLES + kinds.get("lds", 0)
    loaded = sum(width * count for width, count in found.loads.items()) * arch.lanes
    memory = loaded * unit.simds / (unit.memory if kernel.streams else _CACHE_BYTES)
    shared = kinds.get("lds", 0) * arch.lanes * _SHARED_WIDTH * unit.simds / _SHARED_BYTES
    busy = max(issue, memory, shared)
    waves = resident_waves(arch, found)
    stages = max(int(kernel.options.get("num_stages", 1)), 1)
    covered = (_LATENCY / stages + busy) / max(waves, 0.5)
    work = kernel.step_bytes / found.warps if kernel.step_bytes else float(found.products or loaded or 1)
    broken = BROKEN if problems(kernel, arch, found) or not waves else 1.0
    return max(busy, covered) / work * broken
