"""The page and the plots: self-contained, small, honest about what was not measured; seen by a browser."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgeformer import cli
from edgeformer.bench.plots import OKABE_ITO, PAGE, PAPER, Plotter, all_figures, to_png, to_svg
from edgeformer.bench.report import LARGEST_PAGE, page, write
from edgeformer.bench.result_files import Results

pytest.importorskip("matplotlib")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def rows(pretend: Any, **options: Any) -> list[dict[str, Any]]:
    return pretend(
        prompt=(512,), generate=(128,), depth=(0, 1024, 4096), batch=(1, 4), ttft=True, quality_tokens=64,
        scenarios=("single-stream",), watts=30.0, peers=("llama.cpp", "openvino"), **options,
    )  # fmt: skip


@pytest.fixture
def results(pretend: Any, tmp_path: Path) -> Results:
    return Results(tmp_path / "this.json", "this", rows(pretend))


def test_the_page_needs_nothing_else(results: Results):
    text = page([results])
    assert len(text.encode()) < LARGEST_PAGE / 4
    assert not re.search(r"https?://(?!www\.w3\.org)|<script|<link|@import|url\((?!#)", text)
    assert '<meta name="viewport"' in text and "prefers-color-scheme:dark" in text
    assert text.count("<svg") == text.count("<figure>") >= 8
    ids = re.findall(r'\bid="([^"]+)"', text)
    clips = [i for i in ids if len(i) == 11 and i.startswith(("p", "m", "h"))]
    assert len(set(clips)) == len(clips)


def test_the_page_tells_problems_and_what_is_unknown(results: Results):
    text = page([results])
    assert "pip install openvino-genai" in text
    assert "missing" in text
    results.rows[0]["device_check"]["warnings"].append("<b>load</b>")
    assert "&lt;b&gt;load&lt;/b&gt;" in page([results])
    for row in results.rows:
        row["energy"] = {"status": "unavailable", "source": "no counter", "joules_per_token": None}
    text = page([results])
    assert "energy is unavailable: no counter" in text
    assert "Bars: energy" not in text


def test_no_speed_of_what_did_not_run(results: Results):
    for row in results.rows:
        if row["engine"] == "edgeformer":
            row["proof"], row["tokens_per_second"] = "compiled", 987654.321
    text = page([results])
    assert "987,654" not in text and "987,700" not in text and "9.877e+05" not in text


def test_plots_are_in_the_pages_colours_and_tell_series_apart_without_colour(results: Results):
    figures = all_figures(Plotter(PAGE), [results])
    wanted = {"prefill", "decode", "roofline", "decode_context", "decode_batch", "first_token"}
    assert wanted | {"memory", "energy", "quality"} <= figures.keys()
    svg = to_svg(figures["decode_context"], "lines")
    ET.fromstring(svg)
    assert "var(--s0)" in svg and "var(--ink)" in svg and 'aria-label="lines"' in svg
    assert "#10000" not in svg and "#0a0b0c" not in svg
    assert "edgeformer" in svg and "llama.cpp" in svg  # letters, not outlines
    axes = all_figures(Plotter(PAPER), [results])["decode_context"].axes[0]
    marks = {line.get_marker() for line in axes.lines if line.get_marker() in "os^D"}
    assert marks == {"o", "s"}


def test_pngs_and_two_devices(results: Results, tmp_path: Path):
    other = Results(tmp_path / "b.json", "b", [dict(r, fingerprint="x") for r in results.rows])
    other.rows[0]["device"] = {"cpu": "Another CPU"}
    written = write([results, other], tmp_path / "page.html", tmp_path / "plots")
    assert all(path.stat().st_size > 0 for path in written)
    assert written[1].read_bytes().startswith(b"\x89PNG")
    text = written[0].read_text()
    assert "EdgeFormer on 2 devices" in text and "edgeformer, this" in text and "edgeformer, b" in text


def test_a_single_sample_and_one_row_are_enough(results: Results):
    one = dataclasses.replace(results, rows=[results.rows[0]])
    assert "<svg" in page([one])
    assert to_png(all_figures(Plotter(PAPER), [one])["prefill"]).startswith(b"\x89PNG")


def test_old_rows_make_a_page(tmp_path: Path):
    """Rows of schema 1 have less, and nothing of it is made up."""
    old = {
        "schema_version": 1, "engine": "edgeformer", "test": "tg128", "tokens_per_second": 10.0,
        "spread": 1.0, "limit_fraction": None, "model": "m.gguf", "samples": [10.0], "threads": 2,
    }  # fmt: skip
    text = page([Results(tmp_path / "old.json", "old", [old])])
    assert "10.0 ± 1.0" in text and "n/a" in text


def test_the_command(results: Results, tmp_path: Path):
    (tmp_path / "rows.json").write_text(json.dumps(results.rows))
    out = tmp_path / "page.html"
    runner = CliRunner()
    made = runner.invoke(cli.app, ["bench", "report", str(tmp_path / "rows.json"), "-o", str(out)])
    assert made.exit_code == 0, made.output
    assert out.read_text().startswith("<!doctype html>")
    bad = runner.invoke(cli.app, ["bench", "report", str(tmp_path / "none.json")])
    assert bad.exit_code == 2 and bad.stderr.startswith("error: ")
    nowhere = str(tmp_path / "no" / "folder" / "page.html")
    bad = runner.invoke(cli.app, ["bench", "report", str(tmp_path / "rows.json"), "-o", nowhere])
    assert bad.exit_code == 2 and "cannot write" in bad.stderr


def contrast(a: str, b: str) -> float:
    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(a), light(b)))
    return (high + 0.05) / (low + 0.05)


def test_the_first_series_are_seen_on_both_backgrounds():
    from edgeformer.bench.report import DARK

    assert all(contrast(colour, "#ffffff") > 3 for colour in OKABE_ITO[:3])
    assert all(contrast(colour, "#0f1318") > 3 for colour in DARK)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
def test_a_browser_shows_it_within_a_phones_width(results: Results, tmp_path: Path):
    """The page is measured by the browser itself: nothing is wider than a phone, and it is quick."""
    probe = (
        "<script>addEventListener('load',()=>{parent.postMessage(JSON.stringify("
        "[document.documentElement.scrollWidth,innerWidth,performance.now(),"
        "[...document.querySelectorAll('svg')].every(s=>s.getBoundingClientRect().width>200)]),'*')})</script>"
    )
    (tmp_path / "inner.html").write_text(page([results]).replace("</body>", f"{probe}</body>"))
    # A headless window is 500 pixels wide at least, a frame may be as narrow as a phone.
    (tmp_path / "page.html").write_text(
        "<script>addEventListener('message',e=>{document.title=e.data})</script>"
        "<iframe src=inner.html style='width:360px;height:800px;border:0'></iframe>"
    )
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", "--dump-dom",
        f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "page.html").as_uri(),
    ]  # fmt: skip
    start = time.monotonic()
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert time.monotonic() - start < 110
    match = re.search(r"<title>(.*?)</title>", found)
    assert match
    wide, window, milliseconds, drawn = json.loads(match[1])
    assert wide <= window == 360 and drawn
    print(f"the page was there after {milliseconds:.0f} ms")
