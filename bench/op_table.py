"""Rows of `bench ops` as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .table import is_shown, markdown_table, render


def render_ops(rows: Sequence[dict[str, Any]], form: str) -> str:
    """Return rows of operators as text; forms other than "md" are those of any row."""
    if form != "md":
        return render(rows, form)
    head = ["operator", "by", "time, µs", "GB/s", "TOP/s", "of limit", "error", "x peer"]
    lines = [markdown_table(head, [operator_cells(row) for row in rows], left=2)]
    notes = [f"- warning: {t}" for row in rows for t in (row.get("device_check") or {}).get("warnings", ())]
    notes += [f"- {row['test']}: {row['error']}" for row in rows if row.get("error")]
    notes += [
        f"- {row['engine']} {row['test']}: {text}"
        for row in rows
        for text in row.get("warnings", ())
        if "limit" in text
    ]
    if notes:
        lines.append("\n".join(dict.fromkeys(notes)))
    return "\n\n".join(lines)


def operator_cells(row: dict[str, Any]) -> list[str]:
    """Return a row's cells; no speed where the kernel did not run on its target."""
    if not is_shown(row):
        return [row["test"], row["engine"], str(row.get("status", "not run")), "", "", "", "", ""]
    return [
        row["test"],
        row["engine"],
        f"{row['seconds'] * 1e6:,.1f} ± {row['seconds_spread'] * 1e6:,.1f}",
        f"{row['gigabytes_per_second']:.1f}",
        f"{row['teraoperations_per_second']:.3f}",
        "" if row["limit_fraction"] is None else f"{row['limit_fraction']:.0%}",
        "" if row["error_to_reference"] is None else f"{row['error_to_reference']:.1e}",
        "" if not row["peer_ratio"] else f"{row['peer_ratio']:.2f}",
    ]
