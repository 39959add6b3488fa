"""Runs side by side: ratios with their confidence, and regressions that are larger than the noise."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .paired import bounds, medians
from .result_files import Results
from .table import as_csv, is_shown, markdown_table

SMALLEST_CHANGE = 0.03  # what two runs of the same commit may differ by
KEY = ("kind", "model", "test", "engine", "threads")

Row = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """One test in a base run and a new one. Ratios are new over base: above 1 is faster.

    `low` and `high` bound the ratio of medians (bootstrap over the repeats, 95%). `machine` is the ratio of
    the fixed probes: what the machine itself changed by. `verdict` is "faster", "slower", "same", "unsure"
    (beyond the threshold, but not beyond the spread or what the machine changed), "gone" or "new".
    `of_limit` is how the part of the machine's limit changed, with bounds where both runs probed it beside
    each turn. `peer` is the engine of the same version that ran in turns with ours in both runs, `of_peer`
    how our ratio to it changed, with its bounds. A slower machine slows both, and its limits too, so the
    verdict is about the peer's figure and the limit's, which have to agree in a change, else the speeds.
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
    peer: str = ""
    of_peer: float | None = None
    peer_low: float | None = None
    peer_high: float | None = None
    limit_low: float | None = None
    limit_high: float | None = None

    @property
    def regressed(self) -> bool:
        """Whether this counts as a regression."""
        return self.verdict in ("slower", "gone")


def key_of(row: Row) -> tuple[Any, ...]:
    """Return what two rows must share to be compared."""
    return tuple(row.get(name) for name in KEY)


def compare(base: Results, new: Results, threshold: float = SMALLEST_CHANGE) -> list[Change]:
    """Return a Change for every test of either run, in the base's order.

    Where ours ran in pairs with the same peer in both runs, a change counts when the ratio to the peer has
    changed by more than the threshold and its whole interval lies beyond 1. Where both runs probed the limit
    beside each turn, the part of the limit has to do so, too: engines wait for different things, and a
    machine that changed between the runs changes their ratio, but not ours to what ours waits for. Without
    either the whole interval of the ratio of speeds has to lie beyond 1, and the medians to differ by more
    than the threshold, by more than the two spreads together, and by more than what the fixed probe changed
    in the same direction. Between two devices nothing counts as a regression: verdicts are still told.
    """
    old_rows = {key_of(row): row for row in base.rows}
    new_rows = {key_of(row): row for row in new.rows}
    machine = machine_ratio(base, new)
    before, after = peer_versions(base), peer_versions(new)
    peers = [name for name, version in before.items() if after.get(name) == version]
    return [
        _change(old_rows.get(key), new_rows.get(key), machine, threshold, peers)
        for key in dict.fromkeys([*old_rows, *new_rows])
    ]


def peer_versions(results: Results) -> dict[str, str]:
    """Return the version and the build of each peer of a run."""
    details = {row["engine"]: row.get("engine_details") or {} for row in results.rows}
    return {
        name: f"{found['version']} {found.get('system_info', '')}"
        for name, found in details.items()
        if name != "edgeformer" and found.get("version")
    }


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


def _change(
    old: Row | None, new: Row | None, machine: float | None, threshold: float, peers: Sequence[str]
) -> Change:
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
    found = Change(*names, before, after, ratio, low, high, machine, _limit_ratio(old, new), verdict)
    beside: list[str] = []
    if limit := _beside_limit(old, new):
        beside.append(judge(*limit, 0.0, None, threshold))
        found = replace(found, of_limit=limit[0], limit_low=limit[1], limit_high=limit[2])
    if nearest := _beside(old, new, peers):
        peer, part, least, most = nearest[-1]
        beside.append(judge(part, least, most, 0.0, None, threshold))
        found = replace(found, peer=peer, of_peer=part, peer_low=least, peer_high=most)
    if not beside:
        return found
    change = beside[-1] in ("slower", "faster")
    return replace(found, verdict="unsure" if change and len(set(beside)) > 1 else beside[-1])


def _beside(old: Row, new: Row, peers: Sequence[str]) -> list[tuple[str, float, float, float]]:
    """Return how our ratio to each peer changed, and its bounds; what is known best comes last."""
    found = []
    for peer in peers if old["engine"] == "edgeformer" else ():
        pairs = [(row.get("ratios") or {}).get(peer, {}).get("pairs") for row in (old, new)]
        if all(pairs):
            found.append((peer, *_ratio_of_medians(*pairs)))
    return sorted(found, key=lambda f: -f[3] / f[2])


def _beside_limit(old: Row, new: Row) -> tuple[float, float, float] | None:
    """Return how the part of the limit changed, and its bounds; None where a run has no such pairs."""
    before, after = ((row.get("of_limit") or {}).get("samples") for row in (old, new))
    if old.get("limit") != new.get("limit"):  # int8 dot products and a matrix unit's do not compare
        return None
    return _ratio_of_medians(before, after) if before and after else None


def _ratio_of_medians(old: Sequence[float], new: Sequence[float]) -> tuple[float, float, float]:
    """Return new over old, and the bounds of its 95% interval."""
    low, high = bounds(medians(new, seed=1) / medians(old))
    return statistics.median(new) / statistics.median(old), low, high


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
    samples = [row.get("samples") or [row["tokens_per_second"]] for row in (old, new)]
    return _ratio_of_medians(*samples)[1:]


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
    head = ["model", "test", "engine", base.label, other.label, "ratio", "95%", "to the limit",
            "to a peer", "verdict"]  # fmt: skip
    body = []
    for c in changes:
        body.append([
            c.model, c.test, c.engine, _speed(c.base), _speed(c.new), _ratio(c.ratio),
            "" if c.low is None else f"{c.low:.2f} to {c.high:.2f}",
            _ratio(c.of_limit) + (f" ({c.limit_low:.3f} to {c.limit_high:.3f})" if c.limit_low else ""),
            f"{c.peer} {_ratio(c.of_peer)} ({c.peer_low:.3f} to {c.peer_high:.3f})" if c.peer else "",
            c.verdict,
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
