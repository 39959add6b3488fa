"""Rows of a measurement as Markdown, JSON or CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

FORMATS = ("md", "json", "csv")


def render(rows: Sequence[dict[str, Any]], form: str) -> str:
    """Return rows as text: "md" for people, "json" a list, "csv" with nested values as JSON."""
    return {"md": _markdown, "json": lambda r: json.dumps(list(r), indent=1), "csv": _csv}[form](rows)


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(
        out, fieldnames=list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n"
    )
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in row.items()})
    return out.getvalue().rstrip("\n")


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    peers = [name for name in dict.fromkeys(row["engine"] for row in rows) if name != "edgeformer"]
    head = ["model", "size", "engine", "threads", "test", "tokens/s", "of limit", *(f"x {p}" for p in peers)]
    lines = [head, ["---"] * 4 + ["---"] + ["---:"] * (len(head) - 5)]
    for row in rows:
        fraction = row["limit_fraction"]
        lines.append(
            [
                row["model"],
                f"{row['size'] / 1e6:.1f} MB",
                row["engine"],
                str(row["threads"]),
                row["test"],
                f"{row['tokens_per_second']:.1f} ± {row['spread']:.1f}",
                "" if fraction is None else f"{fraction:.0%}",
                *(_ratio(row, rows, peer) for peer in peers),
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ratio(row: dict[str, Any], rows: Sequence[dict[str, Any]], peer: str) -> str:
    same = ("model", "test", "threads")
    other = next((r for r in rows if r["engine"] == peer and all(r[k] == row[k] for k in same)), None)
    return "" if other is None else f"{row['tokens_per_second'] / other['tokens_per_second']:.2f}"
