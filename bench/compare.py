"""Runs side by side: ratios with their confidence, and regressions that are larger than the noise."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .result_files import Results
from .table import as_csv, is_shown, markdown_table, paired_ratio

DRAWS = 4000
CONFIDENCE = 0.95
SMALLEST_CHANGE = 0.03  # what two runs of the same commit may differ by
KEY = ("kind", "model", "test", "engine", "threads")

Row = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """One test in a base run and a new one. Ratios are new over base: above 1 is faster.

    `low` and `high` bound the ratio of medians (bootstrap over the repeats, 95%). `machine` is the ratio of
    the fixed probes: what the machine itself changed by. `verdict` is "faster", "slower", "same", "unsure"
    (beyond the threshold, but not beyond the spread or what the machine changed), "gone" or "new".
    `of_limit` is the ratio of the fractions of the machine's limit.
    """

    model: str
    test: str
    engine: str
    threads: int
    base: float | None
    new: float | None
    ratio: float | None
    low: float | None
    high: float | None
    machine: float | None
    of_limit: float | None
    verdict: str

    @property
    def regressed(self) -> bool:
        """Whether this counts as a regression."""
        return self.verdict in ("slower", "gone")


def key_of(row: Row) -> tuple[Any, ...]:
    """Return what two rows must share to be compared."""
    return tuple(row.get(name) for name in KEY)


def compare(base: Results, new: Results, threshold: float = SMALLEST_CHANGE) -> list[Change]:
    """Return a Change for every test of either run, in the base's order.

    A change counts when the whole interval of the ratio lies beyond 1, the median differs by more than the
    threshold, by more than the two spreads together, and by more than what the fixed probe changed in the
    same direction. Between two devices nothing counts as a regression: verdicts are still told.
    """
    old_rows = {key_of(row): row for row in base.rows}
    new_rows = {key_of(row): row for row in new.rows}
    machine = machine_ratio(base, new)
    return [
        _change(old_rows.get(key), new_rows.get(key), machine, threshold)
        for key in dict.fromkeys([*old_rows, *new_rows])
    ]


def machine_ratio(base: Results, new: Results) -> float | None:
    """Return the change of the fixed compute probe's median between two runs, None where one has none."""
    found = []
    for result in (base, new):
        probes = (result.rows[0].get("device_check") or {}).get("probes") or []
        speeds = [p["compute"] for p in probes if isinstance(p, dict) and p.get("compute")]
        if not speeds:
            return None
        found.append(statistics.median(speeds))
    return found[1] / found[0]


def _change(old: Row | None, new: Row | None, machine: float | None, threshold: float) -> Change:
    some = old or new
    assert some is not None
    names = (str(some.get("model", "")), some["test"], some["engine"], int(some.get("threads", 0)))
    before, after = (r["tokens_per_second"] if r and is_shown(r) else None for r in (old, new))
    if before is None or after is None:
        verdict = "gone" if before is not None else "new" if after is not None else "none"
        return Change(*names, before, after, None, None, None, machine, None, verdict)
    assert old is not None and new is not None
    ratio = after / before
    low, high = interval(old, new)
    noise = old["spread"] / before + new["spread"] / after
    verdict = judge(ratio, low, high, noise, machine, threshold)
    return Change(*names, before, after, ratio, low, high, machine, _limit_ratio(old, new), verdict)


def _limit_ratio(old: Row, new: Row) -> float | None:
    parts = (old.get("limit_fraction"), new.get("limit_fraction"))
    return parts[1] / parts[0] if parts[0] and parts[1] else None


def judge(
    ratio: float, low: float, high: float, noise: float, machine: float | None, threshold: float
) -> str:
    """Return the verdict on a ratio new / base."""
    if abs(ratio - 1) <= threshold:
        return "same"
    beyond = (high < 1 or low > 1) and abs(ratio - 1) > noise
    alone = ratio / machine if machine else ratio
    explained = (ratio < 1) != (alone < 1) or abs(alone - 1) <= threshold
    if not beyond or explained:
        return "unsure"
    return "slower" if ratio < 1 else "faster"


def interval(old: Row, new: Row) -> tuple[float, float]:
    """Return the bounds of the ratio of medians: bootstrap of both samples, the same draws every time."""
    import numpy as np

    rng = np.random.default_rng(0)
    medians = []
    for row in (old, new):
        samples = np.asarray(row.get("samples") or [row["tokens_per_second"]], dtype=float)
        medians.append(np.median(rng.choice(samples, (DRAWS, len(samples))), axis=1))
    ratios = medians[1] / medians[0]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)


def paired_ratios(rows: Sequence[Row], peer: str) -> list[Row]:
    """Return EdgeFormer's ratio to a peer for each test, paired by repetition: both ran side by side."""
    found = []
    theirs = {(*key_of(row)[:3], row.get("threads")): row for row in rows if row["engine"] == peer}
    for row in rows:
        other = theirs.get((*key_of(row)[:3], row.get("threads")))
        if row["engine"] != "edgeformer" or other is None or not (is_shown(row) and is_shown(other)):
            continue
        ratio, low, high = paired_ratio(row, other)
        found.append({"test": row["test"], "model": row["model"], "ratio": ratio, "low": low, "high": high})
    return found


def render(base: Results, others: Sequence[Results], threshold: float, form: str) -> tuple[str, bool]:
    """Return the comparison as text ("md", "csv", "json", "jsonl") and whether something regressed."""
    compared = [(other, compare(base, other, threshold)) for other in others]
    regressed = any(
        change.regressed for other, changes in compared if same_device(base, other) for change in changes
    )
    if form != "md":
        rows = [
            {
                "base": base.label,
                "new": other.label,
                "same_device": same_device(base, other),
                **asdict(change),
            }
            for other, changes in compared
            for change in changes
        ]
        if form == "csv":
            return as_csv(rows), regressed
        return (json.dumps(rows, indent=1) if form == "json" else "\n".join(map(json.dumps, rows))), regressed
    return "\n\n".join(_markdown(base, other, changes) for other, changes in compared), regressed


def same_device(base: Results, other: Results) -> bool:
    """Return whether two runs are of the same kind of device, so that a slower one is a regression."""
    return base.fingerprint == other.fingerprint


def _markdown(base: Results, other: Results, changes: Sequence[Change]) -> str:
    head = ["model", "test", "engine", base.label, other.label, "ratio", "95%", "to the limit", "verdict"]
    body = []
    for c in changes:
        body.append([
            c.model, c.test, c.engine, _speed(c.base), _speed(c.new), _ratio(c.ratio),
            "" if c.low is None else f"{c.low:.2f} to {c.high:.2f}", _ratio(c.of_limit), c.verdict,
        ])  # fmt: skip
    lines = [markdown_table(head, body, left=3), ""]
    machine = changes[0].machine if changes else None
    if not same_device(base, other):
        lines.append(f"Different devices: {base.device} and {other.device}; nothing counts as a regression.")
    elif machine is not None:
        lines.append(f"The machine's own speed, by the fixed probe: x {machine:.3f}.")
    for result in (base, other):
        for text in (result.rows[0].get("device_check") or {}).get("warnings", ()):
            lines.append(f"- {result.label}: warning: {text}")
    return "\n".join(lines)


def _speed(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
