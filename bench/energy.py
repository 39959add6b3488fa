"""Energy of a piece of work: the device's own counters, or why there are none. Never zero by default."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
DRM = Path("/sys/class/drm")


@dataclass(frozen=True)
class Counter:
    """A counter in a file: microjoules since some time, which start again at 0 behind `wrap`."""

    path: Path
    name: str
    wrap: int = 0

    def read(self) -> int:
        """Return the counter in microjoules; OSError where this user may not."""
        return int(self.path.read_text())


@dataclass(frozen=True)
class NvmlCounter:
    """An NVIDIA GPU's counter, which is one of NVML's (millijoules since the driver was loaded; Volta on)."""

    handle: Any
    name: str
    wrap: int = 0

    def read(self) -> int:
        """Return the counter in microjoules; OSError where the GPU has none."""
        pynvml: Any = importlib.import_module("pynvml")
        try:
            return 1000 * int(pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle))
        except pynvml.NVMLError as error:
            raise OSError(f"NVML on {self.name}: {error}") from None


class Meter:
    """Reads the energy of all packages, of memory where that is a domain of its own, and of a GPU by name.

    `status` is "measured" or "unavailable", `source` says by what, or why not. Work on a GPU is not measured
    by its host's counters alone.
    """

    def __init__(self, root: Path = POWERCAP, gpu: str = "", drm: Path = DRM) -> None:
        self.counters: list[Counter | NvmlCounter] = []
        self.status, self.source = "unavailable", ""
        try:
            found = _gpu_counters(gpu, drm) if gpu else []
            if gpu and not found:
                self.source = _no_gpu_counter(gpu, drm)
                return
            for counter in [*found, *_packages(root)]:
                counter.read()
                self.counters.append(counter)
        except PermissionError as error:
            self.counters = []
            self.source = f"no permission to read {error.filename}: run as root, or let it be readable"
            return
        except (OSError, ValueError) as error:
            self.counters = []
            self.source = f"the energy counter cannot be read: {error}"
            return
        if not self.counters:
            self.source = f"no energy counter: {root} has no RAPL package (usual inside a virtual machine)"
            return
        self.status = "measured"
        self.source = ", ".join(counter.name for counter in self.counters)

    def read(self) -> list[int] | None:
        """Return every counter, None where there is none."""
        try:
            return [counter.read() for counter in self.counters] or None
        except (OSError, ValueError):
            return None

    def joules(self, before: Sequence[int] | None, after: Sequence[int] | None) -> float | None:
        """Return the joules between two readings; a counter that went down has wrapped once."""
        if not before or not after:
            return None
        total = 0
        for counter, start, end in zip(self.counters, before, after, strict=True):
            total += end - start if end >= start else end - start + counter.wrap
        return total / 1e6


def _packages(root: Path) -> list[Counter]:
    found = []
    for path in sorted(root.glob("intel-rapl:*")):  # AMD's counters have the same name
        name = (path / "name").read_text().strip()
        if name.startswith("package") or name == "dram":
            wrap = int((path / "max_energy_range_uj").read_text())
            found.append(Counter(path / "energy_uj", f"RAPL {name}", wrap))
    return found


def _gpu_counters(name: str, drm: Path) -> list[Counter | NvmlCounter]:
    """Return the counters of the GPUs of this name; several alike cannot be told apart, and all count."""
    if "nvidia" in name.lower():
        return [*_nvml_counters(name)]
    if "intel" not in name.lower():
        return []
    files = sorted(drm.glob("card*/device/hwmon/hwmon*/energy1_input"))  # i915, xe: of the whole card
    return [Counter(path, f"{(path.parent / 'name').read_text().strip()} of {name}") for path in files]


def _nvml_counters(name: str) -> list[NvmlCounter]:
    if importlib.util.find_spec("pynvml") is None:
        return []
    pynvml: Any = importlib.import_module("pynvml")
    found = []
    try:
        pynvml.nvmlInit()
        for i in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(i)
            about = pynvml.nvmlDeviceGetName(handle)
            about = about.decode() if isinstance(about, bytes) else about  # before nvidia-ml-py 12
            if about == name:
                found.append(NvmlCounter(handle, f"NVML of {name}"))
    except pynvml.NVMLError as error:
        raise OSError(f"NVML: {error}") from None
    return found


def _no_gpu_counter(name: str, drm: Path) -> str:
    if "nvidia" in name.lower():
        if importlib.util.find_spec("pynvml") is not None:
            return f"no energy counter of {name}: NVML lists no GPU of that name"
        return f"no energy counter of {name}: it is read through NVML, pip install 'edgeformer[energy]'"
    if "intel" in name.lower():
        return f"no energy counter of {name}: {drm} has no card with energy1_input"
    return f"no energy counter of {name}: its driver has none that is known here"


class Clock:
    """`with clock:` measures the seconds and, where there is a counter, the joules of a block."""

    def __init__(self, meter: Meter | None = None) -> None:
        self.meter = meter or Meter()
        self.seconds = 0.0
        self.joules: float | None = None

    def __enter__(self) -> Clock:
        self._before = self.meter.read()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self.joules = self.meter.joules(self._before, self.meter.read())


def energy_of(
    joules: Sequence[float | None], seconds: Sequence[float], tokens: int, source: str, watts: float | None
) -> dict[str, Any]:
    """Return a row's energy: status "measured", "estimated" (from `watts`) or "unavailable", and the median.

    `joules_per_token` is of the whole package, idle power included; None where it is unavailable.
    """
    known = sorted(j for j in joules if j is not None)
    if known:
        return {"status": "measured", "source": source, "joules_per_token": known[len(known) // 2] / tokens}
    if watts is not None and seconds:
        middle = sorted(seconds)[len(seconds) // 2]
        text = f"{watts:g} W times the time, as told by --watts"
        return {"status": "estimated", "source": text, "joules_per_token": watts * middle / tokens}
    return {"status": "unavailable", "source": source, "joules_per_token": None}
