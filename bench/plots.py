"""Plots of rows, for a page (SVG in the page's own colours, light and dark) and for a README (PNG)."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..compiler.errors import UnsupportedError
from .result_files import Results
from .table import is_shown

Row = dict[str, Any]
SIZE = (4.3, 3.2)  # inches: at a phone's width letters are still 12 pixels high
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "///", "\\\\\\", "xx", "--", "||", "++", "-/")  # lines only: dots make large files


@dataclass(frozen=True)
class Theme:
    """Colours of a figure. The series are Okabe and Ito's, told apart by colour-blind people too."""

    ink: str
    faint: str
    surface: str
    series: tuple[str, ...]


PAGE = Theme("#0a0b0c", "#0d0e0f", "none", tuple(f"#10000{i}" for i in range(8)))
VARIABLES = {"#0a0b0c": "var(--ink)", "#0d0e0f": "var(--faint)"} | {
    f"#10000{i}": f"var(--s{i})" for i in range(8)
}
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666", "#B8A800")
PAPER = Theme("#1b1f24", "#d0d7de", "#ffffff", OKABE_ITO)


@dataclass(frozen=True)
class Series:
    """The rows of one engine in one file."""

    name: str
    index: int
    rows: list[Row]


def series_of(results: Sequence[Results], keep: Callable[[Row], bool]) -> list[Series]:
    """Return one series an engine and file that has rows to show; its colour and mark are always the same."""
    found, index = [], 0
    for result in results:
        for engine in dict.fromkeys(row["engine"] for row in result.rows):
            rows = [r for r in result.rows if r["engine"] == engine and is_shown(r) and keep(r)]
            name = engine if len(results) == 1 else f"{engine}, {result.label}"
            if rows:
                found.append(Series(name, index, rows))
            index += 1
    return found


class Plotter:
    """Draws in one theme."""

    def __init__(self, theme: Theme) -> None:
        try:
            import matplotlib
        except ImportError as error:
            raise UnsupportedError("plots need matplotlib: pip install 'edgeformer[plot]'") from error
        del matplotlib
        self.theme = theme

    def figure(self, title: str, x: str, y: str) -> tuple[Any, Any]:
        """Return an empty figure and its axes."""
        import matplotlib
        from matplotlib.figure import Figure  # not pyplot: it wants a display, and keeps figures

        t = self.theme
        style: dict[Any, Any] = {
            "figure.facecolor": t.surface, "axes.facecolor": "none", "savefig.facecolor": t.surface,
            "text.color": t.ink, "axes.labelcolor": t.ink, "axes.edgecolor": t.faint, "xtick.color": t.ink,
            "ytick.color": t.ink, "grid.color": t.faint, "font.size": 9.5, "axes.titlesize": 10.5,
            "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False,
            "legend.fontsize": 8.5, "axes.spines.top": False, "axes.spines.right": False,
            "hatch.linewidth": 0.6,
        }  # fmt: skip
        with matplotlib.rc_context(style):
            fig = Figure(figsize=SIZE, layout="constrained")
            axes = fig.subplots()
            axes.set_title(title)
            axes.set_xlabel(x)
            axes.set_ylabel(y)
            axes.grid(axis="y", linewidth=0.6)
            axes.set_axisbelow(True)
        fig.set_facecolor(t.surface)
        return fig, axes

    def colour(self, series: Series) -> str:
        """Return the colour of a series."""
        return self.theme.series[series.index % len(self.theme.series)]

    def legend(self, axes: Any, **options: Any) -> None:
        """Draw the legend where there is more than one series."""
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(labelcolor=self.theme.ink, frameon=False, fontsize=8.5, **options)

    def legend_below(self, fig: Any, axes: Any) -> None:
        """Draw the legend under the plot, where it hides nothing, when there is more than one series."""
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        if len(unique) > 1:
            fig.legend(
                unique.values(), unique.keys(), labelcolor=self.theme.ink, frameon=False, fontsize=8.5,
                loc="outside lower center", ncols=min(2, len(unique)),
            )  # fmt: skip


def lines(plotter: Plotter, results: Sequence[Results], title: str, x: str, kind: str, at: str) -> Any | None:
    """Draw speeds of one kind of test against a field of the rows ("depth" or "batch"), with their spread."""
    other = {"depth": "batch", "batch": "depth"}[at]
    found = series_of(results, lambda r: r.get("test_kind") == kind and r.get(other) in (0, 1))
    if max((len({row[at] for row in s.rows}) for s in found), default=0) < 2:
        return None
    fig, axes = plotter.figure(title, x, "tokens/s")
    for s in found:
        points = sorted({(row[at], row["tokens_per_second"], row["spread"]) for row in s.rows})
        axes.errorbar(
            [p[0] for p in points], [p[1] for p in points], yerr=[p[2] for p in points], label=s.name,
            color=plotter.colour(s), marker=MARKERS[s.index % 8], markersize=6, linewidth=1.8, capsize=3,
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_xticks(sorted({row[at] for s in found for row in s.rows}))
    plotter.legend(axes)
    return fig


def bars(
    plotter: Plotter, results: Sequence[Results], title: str, unit: str, groups: Sequence[str],
    value: Callable[[Row, str], tuple[float, float] | None],
) -> Any | None:  # fmt: skip
    """Draw horizontal bars, a group a name and a bar a series; `value(row, group)` is (value, spread)."""
    found = []
    for s in series_of(results, lambda r: True):
        values = {g: v for g in groups for row in s.rows if (v := value(row, g)) is not None}
        if values:
            found.append((s, values))
    shown = [g for g in groups if any(g in values for _, values in found)]
    if not found or not shown:
        return None
    fig, axes = plotter.figure(title, unit, "")
    fig.set_size_inches(SIZE[0], max(2.0, 0.9 + 0.32 * len(shown) * (len(found) + 0.6)))
    largest = max(v[0] for _, values in found for v in values.values())
    for row, (s, values) in enumerate(found):
        for i, group in enumerate(shown):
            if group not in values:
                continue
            amount, spread = values[group]
            at = i * (len(found) + 0.6) + row
            axes.barh(
                at, amount, height=0.86, color=plotter.colour(s), hatch=HATCHES[s.index % 8],
                edgecolor=plotter.theme.ink, linewidth=0.5, xerr=spread or None,
                error_kw={"ecolor": plotter.theme.ink, "capsize": 2, "linewidth": 1},
                label=s.name if i == 0 or group == next(iter(values)) else None,
            )  # fmt: skip
            axes.text(
                amount + spread + largest * 0.015, at, f"{amount:,.4g}", va="center", fontsize=8.5,
                color=plotter.theme.ink,
            )  # fmt: skip
    middle = (len(found) - 1) / 2
    axes.set_yticks([i * (len(found) + 0.6) + middle for i in range(len(shown))], shown)
    axes.invert_yaxis()
    axes.set_xlim(0, max(v[0] + v[1] for _, values in found for v in values.values()) * 1.2)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", linewidth=0.6)
    plotter.legend_below(fig, axes)
    return fig


def pareto(plotter: Plotter, results: Sequence[Results]) -> Any | None:
    """Draw quality (KL against fp32, lower is better) over decode speed."""
    found = series_of(
        results,
        lambda r: r.get("test_kind") == "tg" and r.get("depth") == 0 and r.get("batch") == 1
        and (r.get("quality") or {}).get("status") == "measured",
    )  # fmt: skip
    if not found:
        return None
    fig, axes = plotter.figure(
        "Quality against speed", "decode, tokens/s (right is faster)", "mean KL to fp32, nats"
    )
    for s in found:
        row = s.rows[0]
        axes.scatter(
            row["tokens_per_second"], max(row["quality"]["mean_kl"], 1e-7), s=70, color=plotter.colour(s),
            marker=MARKERS[s.index % 8], edgecolor=plotter.theme.ink, linewidth=0.6, label=s.name, zorder=3,
        )  # fmt: skip
        axes.annotate(
            s.name, (row["tokens_per_second"], max(row["quality"]["mean_kl"], 1e-7)), fontsize=8.5,
            xytext=(0, 8), textcoords="offset points", ha="center", color=plotter.theme.ink,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.margins(0.25)
    return fig


def roofline(plotter: Plotter, results: Sequence[Results]) -> Any | None:
    """Draw operations a second over operations a byte, under the roofs measured in the same run."""
    found = series_of(results, lambda r: bool(_point(r)))
    limits = next(
        (r["limits"] for x in results for r in x.rows if (r.get("limits") or {}).get("read_bandwidth")), None
    )
    if not found or limits is None:
        return None
    roofs = {
        "int8 dot": limits.get("int8_peak"),
        "bf16 matrix": limits.get("matrix_peak"),
        "fp32": limits.get("float_peak"),
    }
    peak = max((v for v in roofs.values() if v), default=None)
    points = {s.name: [p for row in s.rows if (p := _point(row))] for s in found}
    every = [p for part in points.values() for p in part]
    low, high = min(p[0] for p in every) / 3, max(p[0] for p in every) * 3
    fig, axes = plotter.figure("Roofline", "operations a byte", "operations a second")
    bandwidth = limits["read_bandwidth"]
    top = peak or max(p[1] for p in every) * 2
    ridge = min(max(top / bandwidth, low), high)
    axes.plot([low, ridge], [low * bandwidth, ridge * bandwidth], color=plotter.theme.ink, linewidth=1.4)
    axes.text(
        0.02, 0.97, f"slope: memory, {bandwidth / 1e9:.0f} GB/s", transform=axes.transAxes, fontsize=8,
        va="top", color=plotter.theme.ink,
    )  # fmt: skip
    for (name, value), style in zip(roofs.items(), ("-", "--", ":"), strict=True):
        if value:
            axes.plot(
                [min(value / bandwidth, high), high],
                [value, value],
                color=plotter.theme.ink,
                linestyle=style,
                linewidth=1.2,
            )
            axes.annotate(
                f"{name}\n{value / 1e12:.2f} TOP/s", (high, value), xytext=(3, 0), textcoords="offset points",
                va="center", fontsize=8, color=plotter.theme.ink, annotation_clip=False,
            )  # fmt: skip
    for s in found:
        axes.scatter(
            [p[0] for p in points[s.name]], [p[1] for p in points[s.name]], s=34, color=plotter.colour(s),
            marker=MARKERS[s.index % 8], edgecolor=plotter.theme.ink, linewidth=0.4, label=s.name, zorder=3,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    plotter.legend_below(fig, axes)
    return fig


def _point(row: Row) -> tuple[float, float] | None:
    """Return (operations a byte, operations a second) of a row that knows its work."""
    operations, moved = row.get("operations"), row.get("bytes_per_step")
    if not operations or not moved or not row.get("tokens_per_second"):
        return None
    tokens = row.get("tokens", 1) if row.get("test_kind") in ("pp", "op") else row.get("batch", 1)
    return operations / moved, operations * row["tokens_per_second"] / tokens


def all_figures(plotter: Plotter, results: Sequence[Results]) -> dict[str, Any]:
    """Return every figure that these rows can fill, by name, in the order of a page."""
    tests = list(dict.fromkeys(
        row["test"] for result in results for row in result.rows if row.get("test_kind") in ("pp", "tg")
    ))  # fmt: skip
    prefill = [t for t in tests if t.startswith("pp")]
    decode = [t for t in tests if t.startswith("tg")]
    drawn = {
        "prefill": bars(plotter, results, "Prefill", "tokens/s", prefill, _speed),
        "decode": bars(plotter, results, "Decode", "tokens/s", decode, _speed),
        "roofline": roofline(plotter, results),
        "prefill_context": lines(
            plotter, results, "Prefill against context", "tokens in the cache", "pp", "depth"
        ),
        "decode_context": lines(
            plotter, results, "Decode against context", "tokens in the cache", "tg", "depth"
        ),
        "decode_batch": lines(
            plotter, results, "Decode against batch", "sequences side by side", "tg", "batch"
        ),
        "first_token": bars(
            plotter, results, "Time to the first token", "seconds", ["warm", "new process"], _first
        ),
        "memory": bars(plotter, results, "Peak memory", "MB", ["to the first token"], _memory),
        "energy": bars(plotter, results, "Energy", "joules a token", [*prefill[:1], *decode[:1]], _energy),
        "quality": pareto(plotter, results),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _speed(row: Row, group: str) -> tuple[float, float] | None:
    return (row["tokens_per_second"], row["spread"]) if row["test"] == group else None


def _first(row: Row, group: str) -> tuple[float, float] | None:
    first = row.get("first_token") or {}
    samples = first.get("warm_samples" if group == "warm" else "cold_samples") or []
    middle = first.get("warm_seconds" if group == "warm" else "cold_seconds")
    return (middle, (max(samples) - min(samples)) / 2) if middle else None


def _memory(row: Row, group: str) -> tuple[float, float] | None:
    return (row["peak_memory"] / 1e6, 0.0) if row.get("peak_memory") else None


def _energy(row: Row, group: str) -> tuple[float, float] | None:
    joules = (row.get("energy") or {}).get("joules_per_token")
    return (joules, 0.0) if joules and row["test"] == group else None


def to_svg(figure: Any, alt: str) -> str:
    """Return a figure as an SVG element in the page's colours, as wide as its place."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):  # letters stay letters
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = out.getvalue()
    text = text[text.index("<svg") :].strip()
    for placeholder, variable in VARIABLES.items():
        text = text.replace(placeholder, variable)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' width="[\d.]+pt"| height="[\d.]+pt"', "", text, count=2)
    return text.replace("<svg", f'<svg role="img" aria-label="{alt}"', 1)


def to_png(figure: Any) -> bytes:
    """Return a figure as PNG."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=180, metadata={"Software": None})
    return out.getvalue()
