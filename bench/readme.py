"""The README's benchmark section, made from the reviewed results in bench/results, so that they cannot drift.

python -m edgeformer.bench.readme          # writes the section between the markers, and docs/bench/*.png
python -m edgeformer.bench.readme --check  # exit code 1 where the section is not what the results say
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..compiler.errors import FormatError
from .result_files import Results, engines, read_all
from .table import is_shown, markdown_table, mean_kl, of_limit, paired_ratio

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- bench: made by `python -m edgeformer.bench.readme` from bench/results; do not edit -->"
END = "<!-- bench: end -->"
PLOTS = ("decode", "prefill")


def reviewed(folder: Path) -> list[Results]:
    """Read the reviewed results, one file a device and model, in the order of their names."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise FormatError(f"{folder} holds no results")
    return read_all(paths)


def section(results: Sequence[Results]) -> str:
    """Return the section: for each device one table, every model's tests beside the peers'."""
    devices: dict[str, list[Results]] = {}
    for result in results:
        devices.setdefault(result.fingerprint or result.device, []).append(result)
    parts = [_device(found) for found in devices.values()]
    plots = " ".join(f"![{name} speed beside peers](docs/bench/{name}.png)" for name in PLOTS)
    if len(devices) > 1:
        parts.append(f"The plots are of the {result_name(results[0].rows[0].get('device', {}))}:")
    return "\n\n".join([*parts, plots])


def _device(results: Sequence[Results]) -> str:
    row = results[0].rows[0]
    device = row.get("device", {})
    peers = [name for name in engines(r for result in results for r in result.rows) if name != "edgeformer"]
    head = ["model", "test", "EdgeFormer", "of limit", *(f"{peer} (ratio)" for peer in peers)]
    body = [line for result in results for line in _lines(result, peers)]
    kind = " (virtual machine)" if row.get("virtual_machine") else ""
    facts = f"{result_name(device)}{kind}, {row['threads']} threads, tokens/s, medians with half the range; "
    paired = any(r.get("ratios") for result in results for r in result.rows)
    facts += (
        "ratios: medians of turns side by side, with 95% intervals." if paired else "ratios paired by repeat."
    )
    judged = _quality(results)
    warnings = sorted({t for r in results for row in r.rows for t in row["device_check"]["warnings"]})
    told = f"The device check said: {'; '.join(warnings)}." if warnings else ""
    return "\n\n".join(part for part in (facts, markdown_table(head, body, left=2), judged, told) if part)


def _quality(results: Sequence[Results]) -> str:
    """Return each engine's distance to fp32, since a speed without it says little."""
    found: dict[str, str] = {}
    for row in (r for result in results for r in result.rows):
        judged = row.get("quality") or {}
        if judged.get("status") == "measured":
            text = f"{row['engine']} {mean_kl(judged)} ({judged['top1_agreement']:.1%})"
            found.setdefault(row["engine"], text)
    return (
        f"Mean KL to fp32 (how often the likeliest token agrees): {', '.join(found.values())}."
        if found
        else ""
    )


def result_name(device: dict[str, Any]) -> str:
    """Return the device in words."""
    return f"{device.get('cpu', 'unknown CPU')}, {device.get('isa', '')}, {device.get('cores', '?')} cores"


def _lines(result: Results, peers: Sequence[str]) -> list[list[str]]:
    lines = []
    by_test = {(r["engine"], r["test"]): r for r in result.rows if r.get("test_kind") in ("pp", "tg")}
    for row in result.rows:
        if row["engine"] != "edgeformer" or row.get("test_kind") not in ("pp", "tg") or not is_shown(row):
            continue
        line = [
            row["model"].removesuffix(".gguf"),
            row["test"],
            _speed(row),
            of_limit(row, interval=False),
        ]
        for peer in peers:
            other = by_test.get((peer, row["test"]))
            if other is None:
                line.append("")
            elif is_shown(other):
                ratio, low, high = paired_ratio(row, other)
                line.append(f"{_speed(other)} ({ratio:.1f}x, {low:.1f} to {high:.1f})")
            else:
                line.append(str(other.get("status", "")))
        lines.append(line)
    return lines


def _speed(row: dict[str, Any]) -> str:
    return f"{row['tokens_per_second']:,.0f} ± {row['spread']:,.0f}"


def replaced(text: str, made: str, begin: str = BEGIN, end: str = END) -> str:
    """Return a file with the section between the markers. Raises FormatError where they are missing."""
    before, first, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise FormatError(f"the file has no markers {begin!r} and {end!r}")
    return f"{before}{begin}\n\n{made}\n\n{end}{after}"


def main(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit code 1 where it differs.")
    ] = False,
) -> None:
    """Write the README's section and its plots from bench/results."""
    results = reviewed(ROOT / "bench" / "results")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    made = replaced(text, section(results))
    if check:
        raise typer.Exit(0 if made == text else 1)
    readme.write_text(made, encoding="utf-8")
    from .plots import PAPER, Plotter, all_figures, to_png

    folder = ROOT / "docs" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    figures = all_figures(Plotter(PAPER), results[:1])
    for name in PLOTS:
        if name in figures:
            (folder / f"{name}.png").write_bytes(to_png(figures[name]))
    typer.echo(f"README.md and {folder.relative_to(ROOT)} are made from {len(results)} files", err=True)


if __name__ == "__main__":
    typer.run(main)
