"""Which record serves a problem: this device's, else its micro-architecture's, else its instruction set's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .records import Record
from .target import Target


def fingerprint(target: Target) -> str:
    """Return the name of a device: its micro-architecture and caches, which decide what is fast on it."""
    return f"{target.mcpu} {target.isa} l1={target.l1d >> 10}K l2={target.l2 >> 10}K l3={target.l3 >> 10}K"


@dataclass(frozen=True)
class Wanted:
    """What a look-up asks for: a record's key without its configuration."""

    operator: str
    form: str
    space: str
    family: str
    phase: str
    sizes: dict[str, int]
    threads: int
    target: Target

    def empty(self, configuration: Mapping[str, Any]) -> Record:
        """Return a record about this with nothing measured."""
        t = self.target
        about = (self.operator, self.form, self.space, self.family, self.phase, self.sizes, self.threads)
        return Record(*about, fingerprint(t), t.mcpu, t.isa, t.arch, dict(configuration))


@dataclass(frozen=True)
class Found:
    """A record that fits, where it came from, and how it was found ("exact", or "nearest: ...")."""

    record: Record
    origin: str
    how: str


_FARTHEST = 8.0  # octaves: a record of another size beyond that says nothing


def look_up(wanted: Wanted, records: Iterable[tuple[Record, str]]) -> list[Found]:
    """Return the records that fit, best first: this device, then its micro-architecture, then its ISA.

    On each of these exact ones stand before near ones (sizes by octaves), the user's before imported and
    shipped ones. A shipped one serves its micro-architecture alone: elsewhere the default knows no less.
    """
    t, device, ranked = wanted.target, fingerprint(wanted.target), []
    same = (wanted.operator, wanted.form, wanted.space, wanted.family, wanted.phase, t.isa, t.arch)
    for order, (record, origin) in enumerate(records):
        key = (record.operator, record.form, record.space, record.family, record.phase)
        if (*key, record.isa, record.arch) != same or record.sizes.keys() != wanted.sizes.keys():
            continue
        away = distance(record, wanted)
        if away > _FARTHEST:
            continue
        level = 0 if record.device == device else (1 if record.mcpu == t.mcpu else 2)
        if level == 2 and origin == "shipped":
            continue
        where = ("", f" on {record.mcpu}", f" on {record.mcpu}, of the same instruction set")[level]
        how = "exact" if not away else "nearest: " + _sizes_text(record, wanted)
        measured = record.source != "measured"
        ranked.append((level, measured, away > 0, away, order, Found(record, origin, how + where)))
    ranked.sort(key=lambda entry: entry[:-1])
    return [entry[-1] for entry in ranked]


def distance(record: Record, wanted: Wanted) -> float:
    """Return how many octaves a record's sizes and threads are from what is wanted; 0: the same bucket."""
    total = octaves(record.sizes, wanted.sizes)
    if record.threads != wanted.threads:
        total += 0.5 + abs(math.log2(max(record.threads, 1) / max(wanted.threads, 1)))
    return total


def octaves(some: Mapping[str, int], others: Mapping[str, int]) -> float:
    """Return how many octaves sizes of the same names are apart, summed."""
    total = 0.0
    for name, size in others.items():
        if some[name] != size:
            total += abs(math.log2(max(some[name], 1) / max(size, 1))) or 0.01
    return total


def _sizes_text(record: Record, wanted: Wanted) -> str:
    other = [
        f"{name}={record.sizes[name]}" for name, size in wanted.sizes.items() if record.sizes[name] != size
    ]
    if record.threads != wanted.threads:
        other.append(f"threads={record.threads}")
    return " ".join(other)


def bucket(size: int) -> int:
    """Return the lower edge of a run-time size's bucket: the power of two at or below it."""
    return 1 << max(size, 1).bit_length() - 1


def stale(record: Record, versions: Mapping[str, str]) -> str:
    """Return which tool's minor version differs from the record's, or "". Torch's does not matter."""
    for name in ("apache-tvm", "triton"):
        then, now = (record.versions or {}).get(name), versions.get(name)
        if then and now and then.split(".")[:2] != now.split(".")[:2]:
            return f"{name} {then}, now {now}"
    return ""
