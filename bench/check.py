"""Is this machine fit to be measured: other load, drift of a fixed probe, throttling, stolen time."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .probes import loops_of
from .provenance import governor

IDLE_WINDOW = 0.4  # seconds
BUSY_CORES = 0.10  # of others, while we rest or in the mean of the run
STOLEN = 0.02  # part of the cores' time that the hypervisor gave to others
DRIFT = 0.05  # between the fastest and the slowest probe
FEW_REPEATS = 3
HIGHEST_FRACTION = 1.02  # of a limit: above, one of the two figures is wrong
WIDE_SPREAD = 0.10  # half range over median

Probe = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Load:
    """Core seconds since boot: of everybody, given to other guests by the hypervisor, and our own."""

    wall: float
    busy: float
    stolen: float
    own: float

    def others_since(self, before: Load) -> float:
        """Return how many cores others kept busy since `before`."""
        wall = max(self.wall - before.wall, 1e-9)
        return max(0.0, (self.busy - before.busy) - (self.own - before.own)) / wall

    def stolen_since(self, before: Load, cores: int) -> float:
        """Return the part of all cores' time that was stolen since `before`."""
        return max(0.0, self.stolen - before.stolen) / max(self.wall - before.wall, 1e-9) / cores


def read_load(processes: Iterable[int] = ()) -> Load:
    """Return the counters now; `processes` are ours beside this one."""
    import psutil

    times = psutil.cpu_times()
    busy = sum(getattr(times, n, 0.0) for n in ("user", "nice", "system", "irq", "softirq"))
    busy -= getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted in user already
    spent = psutil.Process().cpu_times()
    own = spent.user + spent.system
    own += getattr(spent, "children_user", 0.0) + getattr(spent, "children_system", 0.0)  # those that ended
    for pid in processes:
        with contextlib.suppress(psutil.Error):
            spent = psutil.Process(pid).cpu_times()
            own += spent.user + spent.system
    return Load(time.monotonic(), busy, getattr(times, "steal", 0.0), own)


def throttles(root: Path = Path("/sys/devices/system/cpu")) -> int | None:
    """Return how often cores were throttled for heat since boot, None where the system does not tell."""
    counts = []
    for path in root.glob("cpu[0-9]*/thermal_throttle/*_throttle_count"):
        with contextlib.suppress(OSError, ValueError):
            counts.append(int(path.read_text()))
    return sum(counts) if counts else None


def temperature() -> float | None:
    """Return the hottest sensor of the CPU in degrees Celsius, None where there is none."""
    import psutil

    sensors = getattr(psutil, "sensors_temperatures", dict)()
    found = [s.current for name in ("coretemp", "k10temp", "cpu_thermal") for s in sensors.get(name, ())]
    return max(found, default=None)


def fixed_probe(threads: int, repeats: int = 5) -> dict[str, float]:
    """Return the median speed of the same small work every time: dot products (and tile products, where
    there is a matrix unit) in L1, and a read of memory.

    Unlike a limit it is a median: what disturbs a measurement shall disturb it too.
    """
    import torch

    from ..compiler.errors import BuildError
    from ..runtime import probes as native
    from ..runtime.threads import set_threads

    set_threads(threads)
    tiles: list[float] = []
    try:
        compute = [native.float_dot_peak(threads, repeats=1) for _ in range(repeats)]
        tiles = [peak for _ in range(repeats) if (peak := native.matrix_peak(threads, repeats=1))]
    except BuildError:
        a = torch.ones(256, 256)
        compute = [_rate(lambda: a @ a, 2 * 256**3) for _ in range(repeats)]
    data = _memory()
    data.sum()
    memory = [_rate(data.sum, data.nbytes) for _ in range(repeats)]
    found = {"compute": compute, "memory": memory} | ({"matrix": tiles} if tiles else {})
    return {name: statistics.median(speeds) for name, speeds in found.items()}


TURN_SECONDS = 0.02  # of each limit between two turns, one call at least
TURN_ROUNDS = 2000  # of a loop on registers: a quarter of a millisecond


def turn_limits(threads: int, target: str = "auto") -> dict[str, float]:
    """Return the machine's limits at this moment, the best of a short while.

    "memory" in bytes a second; "int8", "float" and, of a matrix unit, "bfloat16" in operations a second, by
    the loops of `measure_limits`, of `target`; without these loops torch reads memory, and that is all.
    """
    from ..compiler.errors import BuildError
    from ..runtime import probes as native
    from ..runtime.threads import set_threads

    set_threads(threads)
    data = _memory()
    try:
        with loops_of(target):
            read, loops = native.reader(threads), native.rounds(threads, TURN_ROUNDS)
    except BuildError:
        return {"memory": _best_rate(data.sum, data.nbytes)}
    found = {"memory": _best_rate(lambda: read(data.data_ptr(), data.nbytes), data.nbytes)}
    return found | {name: _best_rate(call, operations) for name, (call, operations) in loops.items()}


def _best_rate(call: Callable[[], object], amount: float) -> float:
    end, best = time.perf_counter() + TURN_SECONDS, _rate(call, amount)
    while time.perf_counter() < end:
        best = max(best, _rate(call, amount))
    return best


_kept: list[Any] = []


def _memory() -> Any:
    """Return a buffer that the last-level cache cannot hold; the same one in every probe of a process."""
    import torch

    from ..compiler.measure import EVICTING
    from ..compiler.target import available_memory, detect

    if not _kept:
        size = min(max(128 << 20, EVICTING * detect().l3), available_memory() // 8)
        _kept.append(torch.ones(size // 4, dtype=torch.float32))
    return _kept[0]


def _rate(call: Callable[[], object], amount: float) -> float:
    start = time.perf_counter()
    call()
    return amount / (time.perf_counter() - start)


@dataclass
class DeviceCheck:
    """Watches the device from before the first measurement to behind the last one.

    `probe` returns named speeds; `processes` the ids of our own children at that moment.
    """

    threads: int
    cores: int
    probe: Probe
    processes: Callable[[], Iterable[int]] = tuple
    probes: list[dict[str, float]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def before(self) -> list[str]:
        """Look at the resting machine, probe it, start watching; return what speaks against measuring."""
        resting = read_load()
        time.sleep(IDLE_WINDOW)
        others = read_load().others_since(resting)
        self.facts["others_before"] = round(others, 3)
        if others > BUSY_CORES:
            self._warn(f"other programs keep {others:.2f} cores busy before the run")
        kind = governor()
        if kind is not None and kind not in ("performance", "schedutil"):
            self._warn(f"the frequency governor is {kind}, not performance")
        if self.threads > self.cores:
            self._warn(f"{self.threads} threads share {self.cores} cores")
        self._throttles, self._start = throttles(), read_load(self.processes())
        self.again()
        return list(self.warnings)

    def again(self) -> None:
        """Probe between two measurements."""
        self.probes.append(self.probe())

    def after(self) -> list[str]:
        """Probe a last time and judge the run; return all warnings."""
        end = read_load(self.processes())
        self.again()
        others = end.others_since(self._start)
        stolen = end.stolen_since(self._start, self.cores)
        self.facts |= {"others_during": round(others, 3), "stolen": round(stolen, 4)}
        if others > BUSY_CORES:
            self._warn(f"other programs kept {others:.2f} cores busy during the run")
        if stolen > STOLEN:
            self._warn(f"the hypervisor took {stolen:.0%} of the cores' time")
        for name in self.probes[0]:
            drift = self.drift(name)
            self.facts[f"{name}_drift"] = round(drift, 4)
            if drift > DRIFT:
                self._warn(f"the fixed {name} probe drifted by {drift:.0%}: the machine's own speed changed")
        now = throttles()
        if now is not None and self._throttles is not None and now > self._throttles:
            self._warn(f"cores were throttled for heat {now - self._throttles} times")
        self.facts["temperature"] = temperature()
        return list(self.warnings)

    def drift(self, name: str) -> float:
        """Return how much slower the slowest probe was than the fastest, as a part of the fastest."""
        speeds = [probe[name] for probe in self.probes]
        return 1 - min(speeds) / max(speeds)

    def row(self) -> dict[str, Any]:
        """Return what every row of the run keeps of this check."""
        probes = [{name: float(f"{speed:.4g}") for name, speed in probe.items()} for probe in self.probes]
        return {"warnings": list(self.warnings), "probes": probes, **self.facts}

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


def sample_warnings(samples: list[float]) -> list[str]:
    """Return what speaks against a row's own samples: too few, or too far apart."""
    found = []
    if len(samples) < FEW_REPEATS:
        found.append(f"only {len(samples)} repeats: no spread worth the name")
    middle = statistics.median(samples)
    wide = (max(samples) - min(samples)) / 2 / middle
    if wide > WIDE_SPREAD:
        found.append(f"repeats differ by ±{wide:.0%}")
    return found
