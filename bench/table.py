"""Rows of a measurement as Markdown, JSON, JSON lines or CSV."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from typing import Any

FORMATS = ("md", "json", "jsonl", "csv")
Rows = Sequence[dict[str, Any]]


def render(rows: Rows, form: str) -> str:
    """Return rows as text: "md" for people, "json", "jsonl" (a row a line), "csv" (nested values as JSON)."""
    if form == "md":
        return markdown(rows)
    if form == "json":
        return json.dumps(list(rows), indent=1)
    return "\n".join(json.dumps(row) for row in rows) if form == "jsonl" else as_csv(rows)


def as_csv(rows: Rows) -> str:
    """Return rows as CSV with every field of any row as a column."""
    out = io.StringIO()
    fields = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(out, fieldnames=fields, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in row.items()})
    return out.getvalue().rstrip("\n")


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]], left: int) -> str:
    """Return a Markdown table whose first `left` columns are aligned to the left, the others to the right."""
    lines = [list(head), ["---"] * left + ["---:"] * (len(head) - left), *map(list, body)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def markdown(rows: Rows) -> str:
    """Return the tables for people: speeds, then what belongs to an engine, then warnings and problems."""
    parts = [_speeds(rows), _engines(rows), _scenarios(rows), _notes(rows)]
    return "\n\n".join(part for part in parts if part)


def is_shown(row: dict[str, Any]) -> bool:
    """Return whether a row has a speed that may be printed: measured, and its kernels ran on the target."""
    return row.get("tokens_per_second") is not None and row.get("proof", "run") == "run"


def _speeds(rows: Rows) -> str:
    peers = [name for name in dict.fromkeys(row["engine"] for row in rows) if name != "edgeformer"]
    head = ["model", "size", "engine", "threads", "test", "tokens/s", "of limit", *(f"x {p}" for p in peers)]
    if energy := any((row.get("energy") or {}).get("joules_per_token") for row in rows):
        head.append("J/token")
    body = []
    for row in rows:
        line = [row["model"], f"{row['size'] / 1e6:.1f} MB", row["engine"], str(row["threads"]), row["test"]]
        if is_shown(row):
            line += [
                f"{row['tokens_per_second']:.1f} ± {row['spread']:.1f}",
                of_limit(row),
                *(_ratio(row, rows, peer) for peer in peers),
            ]
        else:
            line += [row.get("status", "not run"), "", *("" for _ in peers)]
        if energy:
            line.append(energy_text(row))
        body.append(line)
    return markdown_table(head, body, left=5)


def of_limit(row: dict[str, Any], interval: bool = True) -> str:
    """Return a row's part of the limit in words, "" where the limit is not known.

    Beside the limit of the same moments, with its interval; rows of old runs have the run's best limit alone.
    """
    if found := row.get("of_limit"):
        bounds = f" ({found['low']:.0%} to {found['high']:.0%})" if interval else ""
        return f"{found['ratio']:.0%}{bounds}"
    part = row["limit_fraction"]
    return "" if part is None else f"{part:.0%}"


def energy_text(row: dict[str, Any]) -> str:
    """Return joules a token, "~" before an estimate, or "n/a"; never zero for what is not known."""
    energy = row.get("energy") or {}
    if energy.get("joules_per_token") is None:
        return "n/a"
    return f"{'~' if energy['status'] == 'estimated' else ''}{energy['joules_per_token']:.4g}"


def _ratio(row: dict[str, Any], rows: Rows, peer: str) -> str:
    same = ("model", "test", "threads")
    other = next((r for r in rows if r["engine"] == peer and all(r[k] == row[k] for k in same)), None)
    if other is None or not is_shown(other):
        return ""
    if row is other:
        return "1.00"
    ratio, low, high = paired_ratio(row, other)
    return (
        f"{ratio:.2f} ({low:.2f} to {high:.2f})"
        if other["engine"] in row.get("ratios", {})
        else f"{ratio:.2f}"
    )


def paired_ratio(row: dict[str, Any], other: dict[str, Any]) -> tuple[float, float, float]:
    """Return the ratio of two rows of a run and its bounds.

    From the pairs that the row keeps: the median and its 95% interval. Two peers, and rows of old runs, are
    paired by repeat: the median, the lowest and the highest.
    """
    if found := row.get("ratios", {}).get(other["engine"]):
        return found["ratio"], found["low"], found["high"]
    pairs = [a / b for a, b in zip(row.get("samples", ()), other.get("samples", ()), strict=False)]
    pairs = pairs or [row["tokens_per_second"] / other["tokens_per_second"]]
    return statistics.median(pairs), min(pairs), max(pairs)


def _engines(rows: Rows) -> str:
    seen: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in rows:
        if row.get("first_token") or row.get("quality"):
            seen.setdefault((row["model"], row["engine"], row["threads"]), row)
    if not seen:
        return ""
    prompt = next((r["first_token"]["prompt"] for r in seen.values() if r.get("first_token")), None)
    head = ["engine", f"first token of {prompt}, warm" if prompt else "first token, warm", "new process",
            "peak memory", "perplexity", "KL", "top-1"]  # fmt: skip
    body = []
    for (_, engine, _), row in seen.items():
        first, judged = row.get("first_token") or {}, row.get("quality") or {}
        body.append([
            engine, _seconds(first.get("warm_seconds")), _seconds(first.get("cold_seconds")),
            f"{row['peak_memory'] / 1e6:.0f} MB" if row.get("peak_memory") else "n/a", *quality_texts(judged),
        ])  # fmt: skip
    return markdown_table(head, body, left=1)


def quality_texts(judged: dict[str, Any]) -> list[str]:
    """Return perplexity with its change against fp32, mean KL, and agreement of the likeliest token."""
    if judged.get("status") != "measured":
        return ["n/a", "n/a", "n/a"]
    change = judged["perplexity"] / judged["reference_perplexity"] - 1
    return [f"{judged['perplexity']:.2f} ({change:+.2%})", mean_kl(judged), f"{judged['top1_agreement']:.1%}"]


def mean_kl(judged: dict[str, Any]) -> str:
    """Return the mean KL divergence; of the reference itself, rounding may leave it a little below 0."""
    return f"{max(judged['mean_kl'], 0.0):.2g}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "n/a"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _scenarios(rows: Rows) -> str:
    found = [row for row in rows if row.get("scenario")]
    if not found:
        return ""
    head = ["scenario", "engine", "queries", "samples/s", "latency p50", "p90", "p99", "first token p90"]
    body = []
    for row in found:
        s = row["scenario"]
        facts = [row["test"], row["engine"], str(s["queries"]), f"{s['samples_per_second']:.2f}"]
        latency = [_seconds(s["latency"][p]) for p in ("p50", "p90", "p99")]
        body.append([*facts, *latency, _seconds(s["first_token"]["p90"])])
    return markdown_table(head, body, left=2)


def of_engine(row: dict[str, Any], text: str) -> str:
    """Return a text that names its engine once."""
    return text if text.startswith(f"{row['engine']}:") else f"{row['engine']}: {text}"


def _notes(rows: Rows) -> str:
    """Return what a reader must know: problems of the device, of engines, of single rows."""
    checks = [row.get("device_check") or {} for row in rows]
    lines = [f"- warning: {text}" for check in checks for text in check.get("warnings", ())]
    for row in rows:
        if row.get("error"):
            lines.append(f"- {of_engine(row, row['error'])}")
        lines += [f"- {row['engine']} {row['test']}: {text}" for text in row.get("warnings", ())]
        judged = row.get("quality") or {}
        if judged.get("status") == "unavailable" and judged["reason"] != row.get("error"):
            lines.append(f"- {row['engine']}: no quality: {judged['reason']}")
        if (row.get("energy") or {}).get("status") == "unavailable":
            lines.append(f"- energy is unavailable: {row['energy']['source']}")
    return "\n".join(dict.fromkeys(lines))
