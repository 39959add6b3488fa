"""From what a run measured to its rows: one a test and engine, each with where it comes from."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import scenarios
from .check import HIGHEST_FRACTION, sample_warnings
from .device import device
from .energy import energy_of
from .fleet import OURS
from .options import Options
from .paired import FEWEST, MOVED, Pair, counting, estimate, moved
from .probes import Limits
from .provenance import provenance
from .turns import MATTERS
from .work import Test, Work, fractions

EMPTY = {
    "tokens_per_second": None,
    "spread": None,
    "samples": [],
    "limit_fraction": None,
    "limit_fraction_with_attention": None,
    "of_limit": None,
    "limit": "",
    "ratios": {},
}


@dataclass(frozen=True)
class RunFacts:
    """A finished run: what was asked, and the journal's units."""

    path: Path
    options: Options
    threads: int
    run_id: str
    time: str
    units: dict[str, Any]

    def engines(self) -> list[str]:
        """Return the engines in order."""
        return [OURS, *dict.fromkeys(self.options.peers)]

    def limits_of(self, session: str) -> Limits:
        """Return the best figures of the probes that ran in the same session as a test."""
        found = [Limits(**u["limits"]) for u in self.units.values() if u.get("session") == session]
        best = found[0]
        for limits in found[1:]:
            best = limits if limits.rounds > best.rounds else best  # each holds those before it
        return best


def model_size(path: Path) -> int:
    """Return the bytes of a model's file, or of all files of its folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def build_rows(run: RunFacts) -> list[dict[str, Any]]:
    """Return the rows of a run: tests first, then scenarios."""
    shared = provenance(run.run_id, run.threads, run.time) | {
        "kind": "model",
        "model": run.path.name,
        "size": model_size(run.path),
        "records": run.units.get("about:edgeformer", {}).get("records", {}),
        "device_check": _check(run),
    }
    rows = []
    for test in run.options.tests():
        unit = run.units[f"speed:{test.name}"]
        rows += [shared | _speed_row(run, test, name, unit) for name in run.engines()]
    for scenario in run.options.scenarios:
        unit = run.units[f"scenario:{scenario}"]
        rows += [shared | _scenario_row(run, scenario, name, unit[name]) for name in run.engines()]
    return rows


def _check(run: RunFacts) -> dict[str, Any]:
    """Return the device check; of a resumed run, all warnings and probes and the last facts."""
    parts = [unit for name, unit in run.units.items() if name.startswith("check:")]
    merged: dict[str, Any] = {}
    for part in parts:
        merged |= part
    merged["warnings"] = list(dict.fromkeys(text for part in parts for text in part["warnings"]))
    merged["probes"] = [probe for part in parts for probe in part["probes"]]
    return merged


def _speed_row(run: RunFacts, test: Test, name: str, unit: dict[str, Any]) -> dict[str, Any]:
    found = unit["engines"][name]
    row = {
        "engine": name,
        "test": test.name,
        "test_kind": test.kind,
        "tokens": test.tokens,
        "depth": test.depth,
        "batch": test.batch,
    }
    if problem := found.get("problem"):
        return row | EMPTY | _problem(problem) | _engine_facts(run, name)
    limits = run.limits_of(unit["session"])
    count = test.tokens * test.batch
    speeds = [count / seconds for seconds in found["seconds"]]
    work = Work(**run.units[f"about:{name}"]["work"]) if "work" in run.units[f"about:{name}"] else None
    row |= _speed_figures(speeds)
    row |= _limit_figures(test, row["tokens_per_second"], work, limits)
    row["of_limit"] = None if work is None else _of_limit(test, found, work, limits)
    row["ratios"] = _ratios(name, unit["engines"])
    source = run.units[f"about:{name}"].get("energy_source", "the engine stopped before it told")
    return row | {
        "status": "ok",
        "proof": "run",
        "error": None,
        "warnings": [*sample_warnings(speeds), *_restless(row["ratios"], unit["engines"])],
        "options": found["settled"],
        "energy": energy_of(found["joules"], found["seconds"], count, source, run.options.watts),
        **_engine_facts(run, name),
    }


def _ratios(name: str, engines: dict[str, Any]) -> dict[str, Any]:
    """Return an engine's speed over others', from pairs: ours over each peer's, a peer's over ours."""
    if name != OURS:
        found = _ratio(engines[name].get("pairs", ()), inverse=True)
        return {OURS: found} if found else {}
    ratios = {peer: _ratio(e.get("pairs", ())) for peer, e in engines.items() if "problem" not in e}
    return {peer: ratio for peer, ratio in ratios.items() if ratio}


def _restless(ratios: dict[str, Any], engines: dict[str, Any]) -> list[str]:
    """Return what speaks against ratios: all pairs count, since the machine changed during nearly all."""
    found = []
    for peer in ratios:
        pairs = [Pair(**pair) for pair in engines[peer].get("pairs", ())]
        if any(not pair.steady for pair in counting(pairs)):
            found.append(
                f"no calm moment for its ratio to {peer}: during most pairs the probe moved or others worked"
            )
    return found


def _ratio(kept: Sequence[dict[str, Any]], inverse: bool = False) -> dict[str, Any]:
    return ratio_of_pairs([Pair(**pair) for pair in kept], inverse) if kept else {}


def ratio_of_pairs(pairs: Sequence[Pair], inverse: bool = False) -> dict[str, Any]:
    """Return what a row keeps of a ratio: the median, its 95% interval, the pairs that count."""
    found = [1 / pair.ratio if inverse else pair.ratio for pair in counting(pairs)]
    known = estimate(found)
    digits = {"ratio": known.middle, "low": known.low, "high": known.high}
    return {
        **{key: float(f"{value:.4g}") for key, value in digits.items()},
        "pairs": [float(f"{ratio:.4g}") for ratio in found],
        "dropped": len(pairs) - len(found),
        "moved": round(max(pair.moved for pair in counting(pairs)), 3),
        "others": round(max(pair.others for pair in counting(pairs)), 3),
    }


def _speed_figures(speeds: Sequence[float]) -> dict[str, Any]:
    return {
        "tokens_per_second": round(statistics.median(speeds), 3),
        "spread": round((max(speeds) - min(speeds)) / 2, 3),
        "samples": [round(s, 3) for s in speeds],
    }


def _limit_figures(test: Test, speed: float, work: Work | None, limits: Limits) -> dict[str, Any]:
    measured = {
        "read_bandwidth": limits.read_bandwidth,
        "int8_peak": limits.int8_peak,
        "float_peak": limits.float_peak,
        "matrix_peak": limits.matrix_peak,
        "rounds": limits.rounds,
        "probes": limits.probes,
    }
    if work is None:
        return {
            "limit_fraction": None,
            "limit_fraction_with_attention": None,
            "limit": "",
            "limits": measured,
        }
    part = fractions(test, speed, work, limits, device()["l3_bytes"])
    return {
        "limit_fraction": None if part.limit is None else round(part.limit, 4),
        "limit_fraction_with_attention": (
            None if part.with_attention is None else round(part.with_attention, 4)
        ),
        "limit": part.why,
        "limits": measured,
        "bytes_per_step": work.step_bytes(test) if test.kind == "tg" else work.weight_bytes,
        "operations": work.operations(test),
    }


def _of_limit(test: Test, found: dict[str, Any], work: Work, limits: Limits) -> dict[str, Any] | None:
    """Return which part of the limit each turn was, by the probes before and behind it; None without a limit.

    Turns during which the limit moved do not count, unless that leaves too few. A turn above its limit never
    counts: what was probed beside it was no limit, since other programs had the cores.
    """
    names, parts = MATTERS.get(test.kind, ()), []
    for seconds, (before, after) in zip(found["seconds"], found.get("probes", ()), strict=False):
        now = limits.at({name: max(before[name], after[name]) for name in before})
        part = fractions(test, test.tokens * test.batch / seconds, work, now, device()["l3_bytes"]).limit
        if part is not None:
            parts.append((moved(before, after, names) <= MOVED, part))
    possible = [(calm, part) for calm, part in parts if part <= HIGHEST_FRACTION]
    steady = [part for calm, part in possible if calm]
    counted = steady if len(steady) >= FEWEST else [part for _, part in possible]
    if 2 * len(possible) < len(parts) or not counted:
        return None
    known = estimate(counted)
    digits = {"ratio": known.middle, "low": known.low, "high": known.high}
    return {
        **{name: float(f"{value:.4g}") for name, value in digits.items()},
        "samples": [float(f"{part:.4g}") for part in counted],
        "dropped": len(parts) - len(counted),
    }


def _engine_facts(run: RunFacts, name: str) -> dict[str, Any]:
    """Return what belongs to an engine and not to one test: build, quality, memory, time to first token."""
    first = run.units.get("ttft", {}).get(name)
    return {
        "engine_details": run.units.get(f"about:{name}", {}).get("details", {}),
        "quality": run.units.get("quality", {}).get(name),
        "peak_memory": None if first is None else first.get("peak_memory"),
        "first_token": None if first is None else _first_token(run, first),
    }


def _first_token(run: RunFacts, first: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"prompt": run.options.query[0]}
    for kind in ("warm", "cold"):
        seconds = first[kind]
        found[f"{kind}_seconds"] = round(statistics.median(seconds), 5) if seconds else None
        found[f"{kind}_samples"] = [round(s, 5) for s in seconds]
    return found | ({"error": first["problem"]["text"]} if "problem" in first else {})


def _problem(problem: dict[str, str]) -> dict[str, Any]:
    status = {"missing": "missing", "timeout": "timeout"}.get(problem["status"], "failed")
    return {"status": status, "proof": "none", "error": problem["text"], "warnings": [], "options": {},
            "energy": None, "limits": {}}  # fmt: skip


def _scenario_row(run: RunFacts, scenario: str, name: str, unit: dict[str, Any]) -> dict[str, Any]:
    row = {"engine": name, "test": scenario, "test_kind": "scenario", "tokens": run.options.query[1],
           "depth": 0, "batch": 1}  # fmt: skip
    if problem := unit.get("problem"):
        return row | EMPTY | _problem(problem) | _engine_facts(run, name)
    prompt, generate = run.options.query
    facts = scenarios.summary(scenario, unit["queries"], prompt, generate)
    speeds = [q["samples"] * generate / q["last"] for q in unit["queries"]]
    return row | EMPTY | {
        **_speed_figures(speeds),
        "tokens_per_second": facts["tokens_per_second"],
        "limits": {},
        "scenario": facts,
        "status": "ok",
        "proof": "run",
        "error": None,
        "warnings": ["too few queries for this percentile"] if facts.get("few") else [],
        "options": {},
        "energy": None,
        **_engine_facts(run, name),
    }  # fmt: skip
