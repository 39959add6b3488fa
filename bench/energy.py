"""Energy of a piece of work: the package's own counter, or why there is none. Never zero by default."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """One RAPL domain: microjoules since some time, which start again at 0 behind `wrap`."""

    path: Path
    name: str
    wrap: int

    def read(self) -> int:
        """Return the counter in microjoules; OSError where this user may not."""
        return int((self.path / "energy_uj").read_text())


class Meter:
    """Reads the energy of all packages and of memory where that is a domain of its own.

    `status` is "measured" or "unavailable", `source` says by what, or why not.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        self.counters: list[Counter] = []
        self.status, self.source = "unavailable", ""
        try:
            self.counters = _counters(root)
            for counter in self.counters:
                counter.read()
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
        self.source = "RAPL " + ", ".join(counter.name for counter in self.counters)

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


def _counters(root: Path) -> list[Counter]:
    found = []
    for path in sorted(root.glob("intel-rapl:*")):  # AMD's counters have the same name
        name = (path / "name").read_text().strip()
        if name.startswith("package") or name == "dram":
            found.append(Counter(path, name, int((path / "max_energy_range_uj").read_text())))
    return found


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
