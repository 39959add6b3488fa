"""One page that tells a device's results: no network, no script, light and dark, readable on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..compiler.errors import CapacityError, FormatError
from .op_table import operator_cells
from .plots import OKABE_ITO, PAGE, PAPER, Plotter, all_figures, to_png, to_svg
from .result_files import Results
from .table import energy_text, is_shown, of_engine, of_limit, quality_texts

LARGEST_PAGE = 2_000_000  # bytes
DARK = ("#56B4E9", "#E69F00", "#3DD6A3", "#E8A0C4", "#9AD4F5", "#F0C75E", "#B0B0B0", "#F0E442")
STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1b1f24;--soft:#57606a;--faint:#d0d7de;--card:#f6f8fa;
--warn:#9a3b00;LIGHT}
@media(prefers-color-scheme:dark){:root{--page:#0f1318;--ink:#e6edf3;--soft:#9aa7b4;--faint:#39424d;
--card:#171d24;--warn:#ffb077;NIGHT}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:1rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0}h2{font-size:1.15rem;margin:2rem 0 .5rem}
p{margin:.4rem 0;max-width:46rem}.soft{color:var(--soft)}
.warn{border-left:4px solid var(--warn);padding:.3rem .8rem;background:var(--card)}
.warn li{overflow-wrap:anywhere}
.scroll{overflow-x:auto;border:1px solid var(--faint);border-radius:6px}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .5rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--faint)}
th:first-child,td:first-child,td.left,th.left{text-align:left}
tr:last-child td{border-bottom:0}thead th{background:var(--card)}
td.text{white-space:normal;text-align:left;min-width:14rem;overflow-wrap:anywhere}
.plots{columns:20rem;column-gap:1rem}
figure{margin:0 0 1rem;break-inside:avoid;
padding:.5rem;background:var(--card);border:1px solid var(--faint);border-radius:6px}
figure svg{display:block;width:100%;height:auto}svg text{font-family:inherit!important}
dl{display:grid;grid-template-columns:auto 1fr;gap:.1rem .8rem;margin:.5rem 0}dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
"""
SPEED_NOTE = (
    "<p class=soft>Medians of interleaved repeats, ± half of the range. <i>Of limit</i> is the part of what "
    "this machine could do at most, measured in the same run: memory bandwidth for decode (tg), the peak of "
    "dot products or of the matrix unit for prefill (pp). <i>EdgeFormer beside it</i> is the median ratio of "
    "turns side by side, with its 95% interval: what slows the machine down slows both.</p>"
)
ALT = {
    "prefill": "Bars: prefill speed of each engine in tokens a second",
    "decode": "Bars: decode speed of each engine in tokens a second",
    "roofline": "Operations a second over operations a byte, under the measured limits",
    "prefill_context": "Lines: prefill speed over the tokens in the cache",
    "decode_context": "Lines: decode speed over the tokens in the cache",
    "decode_batch": "Lines: decode speed over the number of sequences",
    "first_token": "Bars: seconds to the first token, warm and in a new process",
    "memory": "Bars: peak memory to the first token in megabytes",
    "energy": "Bars: energy in joules a token",
    "quality": "Points: mean KL divergence to fp32 over decode speed",
}


def page(results: Sequence[Results], title: str = "EdgeFormer on this device") -> str:
    """Return the page. Raises CapacityError above 2 MB, UnsupportedError without matplotlib."""
    style = STYLE.replace("LIGHT", _colours(OKABE_ITO)).replace("NIGHT", _colours(DARK))
    figures = all_figures(Plotter(PAGE), results)
    plots = "".join(f"<figure>{to_svg(figure, ALT[name])}</figure>" for name, figure in figures.items())
    body = [
        f"<h1>{escape(title)}</h1>",
        *(_device(result) for result in results),
        _warnings(results),
        "<h2>Speed</h2>",
        SPEED_NOTE,
        _speeds(results),
        _engines(results),
        _scenarios(results),
        f"<h2>Plots</h2><div class=plots>{plots}</div>" if plots else "",
        _operators(results),
        _provenance(results),
    ]
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>{''.join(body)}</body></html>"
    )
    if (size := len(text.encode())) > LARGEST_PAGE:
        raise CapacityError(f"the page would be {size / 1e6:.1f} MB, more than 2 MB: give it fewer files")
    return text


def write(results: Sequence[Results], out: Path, pngs: Path | None = None) -> list[Path]:
    """Write the page, and every plot as PNG into `pngs`; return the files. Raises FormatError."""
    written = [out]
    try:
        out.write_text(page(results, _title(results)), encoding="utf-8")
        if pngs is not None:
            pngs.mkdir(parents=True, exist_ok=True)
            for name, figure in all_figures(Plotter(PAPER), results).items():
                written.append(pngs / f"{name}.png")
                written[-1].write_bytes(to_png(figure))
    except OSError as error:
        raise FormatError(f"cannot write {error.filename or out}: {error.strerror or error}") from error
    return written


def _title(results: Sequence[Results]) -> str:
    devices = list(dict.fromkeys(result.device for result in results))
    return f"EdgeFormer on {devices[0]}" if len(devices) == 1 else f"EdgeFormer on {len(devices)} devices"


def _colours(colours: Sequence[str]) -> str:
    return "".join(f"--s{i}:{colour};" for i, colour in enumerate(colours))


def _device(result: Results) -> str:
    row = result.rows[0]
    device = row.get("device") or {}
    memory = device.get("memory_bytes")
    parts = [
        str(device.get("isa", "")),
        f"{device['cores']} cores" if device.get("cores") else "",
        f"{row['threads']} threads" if row.get("threads") else "",
        f"{memory / 2**30:.0f} GiB" if memory else "",
        f"governor {row['governor']}" if row.get("governor") else "",
        "virtual machine" if row.get("virtual_machine") else "",
        str(row.get("time", "")),
        f"commit {str(row['commit'])[:12]}" if row.get("commit") else "",
    ]
    label = f"{result.label}: " if result.label else ""
    return f"<p class=soft>{escape(label + result.device)} · {escape(' · '.join(filter(None, parts)))}</p>"


def _warnings(results: Sequence[Results]) -> str:
    texts: list[str] = []
    for result in results:
        for row in result.rows:
            texts += (row.get("device_check") or {}).get("warnings", ())
            texts += [of_engine(row, row["error"])] if row.get("error") else []
            energy = row.get("energy") or {}
            if energy.get("status") == "unavailable":
                texts.append(f"energy is unavailable: {energy.get('source', '')}")
    unique = "".join(f"<li>{escape(text)}</li>" for text in dict.fromkeys(texts))
    return f"<div class=warn><b>Read these figures with care</b><ul>{unique}</ul></div>" if unique else ""


def _table(head: Sequence[str], body: Sequence[Sequence[str]], left: int = 1) -> str:
    mark = lambda i: " class=left" if i < left else ""  # noqa: E731
    top = "".join(f"<th{mark(i)}>{escape(cell)}</th>" for i, cell in enumerate(head))
    lines = "".join(
        "<tr>" + "".join(f"<td{mark(i)}>{escape(cell)}</td>" for i, cell in enumerate(line)) + "</tr>"
        for line in body
    )
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>"


def _speeds(results: Sequence[Results]) -> str:
    """Return the table of tests, each with all engines together, so that a phone shows them side by side."""
    rows = [(result, row) for result in results for row in result.rows if _is_test(row)]
    tests = list(dict.fromkeys((row.get("model"), row["test"]) for _, row in rows))
    rows.sort(key=lambda pair: tests.index((pair[1].get("model"), pair[1]["test"])))
    several = len({row.get("model") for _, row in rows}) > 1
    body = []
    for result, row in rows:
        line = [row["test"], row["engine"] if len(results) == 1 else f"{row['engine']}, {result.label}"]
        if is_shown(row):
            digits = 0 if row["tokens_per_second"] >= 1000 else 1
            line.append(f"{row['tokens_per_second']:,.{digits}f} ± {row['spread']:,.{digits}f}")
            line.append(of_limit(row, interval=False))
        else:
            line += [str(row.get("status", "not run")), ""]
        line.append(_beside(result, row))
        body.append([*line, energy_text(row), *([str(row.get("model", ""))] if several else [])])
    head = ["test", "engine", "tokens/s", "of limit", "EdgeFormer beside it", "J/token"]
    head += ["model"] if several else []
    models = ", ".join(dict.fromkeys(str(row.get("model", "")) for _, row in rows))
    return f"<p>{escape(models)}</p>{_table(head, body, left=2)}" if body else ""


def _beside(result: Results, row: dict[str, Any]) -> str:
    """Return our speed over a peer's in the same test, from pairs, with its interval."""
    same = ("model", "test", "threads")
    ours = [
        r for r in result.rows if r["engine"] == "edgeformer" and all(r.get(k) == row.get(k) for k in same)
    ]
    found = (ours[0].get("ratios") or {}).get(row["engine"]) if ours and is_shown(ours[0]) else None
    if found is None or not is_shown(row):
        return ""
    return f"{found['ratio']:.2f}x ({found['low']:.2f} to {found['high']:.2f})"


def _is_test(row: dict[str, Any]) -> bool:
    return row.get("kind") != "op" and not row.get("scenario")


def _engines(results: Sequence[Results]) -> str:
    body, seen = [], set()
    for result in results:
        for row in result.rows:
            key = (result.label, row["engine"], row.get("model"), row.get("threads"))
            if key in seen or not (row.get("first_token") or row.get("quality")):
                continue
            seen.add(key)
            first, judged = row.get("first_token") or {}, row.get("quality") or {}
            version = (row.get("engine_details") or {}).get("version", "")
            body.append([
                row["engine"] if len(results) == 1 else f"{row['engine']}, {result.label}", str(version)[:24],
                _seconds(first.get("warm_seconds")), _seconds(first.get("cold_seconds")),
                f"{row['peak_memory'] / 1e6:,.0f} MB" if row.get("peak_memory") else "n/a",
                *quality_texts(judged),
            ])  # fmt: skip
    head = [
        "engine",
        "version",
        "first token, warm",
        "new process",
        "peak memory",
        "perplexity",
        "KL",
        "top-1",
    ]
    return "<h2>First token, memory, quality</h2>" + _table(head, body, left=2) if body else ""


def _scenarios(results: Sequence[Results]) -> str:
    body = []
    for result in results:
        for row in result.rows:
            if facts := row.get("scenario"):
                latency = [_seconds(facts["latency"][p]) for p in ("p50", "p90", "p99")]
                rate = f"{facts['samples_per_second']:.2f}"
                body.append([row["test"], row["engine"], str(facts["queries"]), rate, *latency])
    head = ["scenario", "engine", "queries", "samples/s", "latency p50", "p90", "p99"]
    return "<h2>Scenarios, MLPerf-style</h2>" + _table(head, body, left=2) if body else ""


def _operators(results: Sequence[Results]) -> str:
    body = []
    for result in results:
        for row in result.rows:
            if row.get("kind") == "op":
                body.append(operator_cells(row))
    head = ["operator", "by", "µs", "GB/s", "TOP/s", "of limit", "error", "x peer"]
    return "<h2>Operators</h2>" + _table(head, body, left=2) if body else ""


def _provenance(results: Sequence[Results]) -> str:
    parts = []
    for result in results:
        row = result.rows[0]
        facts = {
            "run": row.get("run_id"), "schema": row.get("schema_version"), "device": row.get("fingerprint"),
            "commit": row.get("commit"), "versions": _pairs(row.get("versions")),
            "records": _pairs(row.get("records")),
        }  # fmt: skip
        items = "".join(
            f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items() if value
        )
        parts.append(f"<p>{escape(result.path.name)}</p><dl>{items}</dl>")
    return f"<h2>Where it comes from</h2>{''.join(parts)}"


def _pairs(found: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in found.items()) if isinstance(found, dict) else ""


def _seconds(value: float | None) -> str:
    if value is None:
        return "n/a"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"
