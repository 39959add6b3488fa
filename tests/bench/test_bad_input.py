"""What goes wrong in the field: a peer that hangs, a killed run, files that do not fit, no display."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgeformer import cli
from edgeformer.bench.child import Patience, Shape
from edgeformer.bench.work import Work

from .conftest import WORK
from .test_child import KIND, ToyEngine

RUNNER = CliRunner()
KILLED = """
    import os, pathlib, signal, sys
    from edgeformer.bench import fleet, model
    from edgeformer.bench.options import Options
    from edgeformer.bench.table import render
    sys.path.insert(0, sys.argv[3])
    from conftest import LIMITS, Pretender

    kill, log = sys.argv[2] == "kill", []

    class Deadly(Pretender):
        def run(self, test):
            if kill and test.name == "tg16" and self._runs > 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().run(test)

    fleet.open_engine = lambda name, *_: Deadly(name, [1.0, 2.0], log)
    model.measure_limits = lambda *_, **__: LIMITS
    model.fixed_probe = model.turn_limits = lambda threads, *target: {"compute": 1.0}
    options = Options(prompt=(8,), generate=(16,), peers=("llama.cpp",), threads=(2,), repeats=3, ttft=False,
                      quality_tokens=0, resume=True)
    rows = model.bench(pathlib.Path(sys.argv[1]), options)
    print(render(rows, "json"))
    print(log.count("warm edgeformer"), file=sys.stderr)
"""


class HangingEngine(ToyEngine):
    """A real child that sleeps for a minute when it is asked for 14 tokens."""

    def work(self) -> Work:
        return WORK


def test_a_peer_that_hangs_costs_its_row_and_a_wait(pretend: Any, engines: dict[str, Any]):
    """It is ended after its time, its row says so, and it is started again for the next test."""
    engines["llama.cpp"] = HangingEngine(KIND, Path("m.gguf"), Shape(2, 128), Patience(answer=0.5))
    rows = pretend(prompt=(14, 4), generate=(16,))
    found = {(row["engine"], row["test"]): row for row in rows}
    assert found["llama.cpp", "pp14"]["status"] == "timeout"
    assert "no answer to 'time' in 0 s and was ended" in found["llama.cpp", "pp14"]["error"]
    assert found["llama.cpp", "pp4"]["status"] == found["llama.cpp", "tg16"]["status"] == "ok"
    assert all(row["status"] == "ok" for row in rows if row["engine"] == "edgeformer")
    engines["llama.cpp"].close()


def test_a_run_that_is_killed_goes_on(tmp_path: Path):
    """SIGKILL in the second test: nothing can tidy up, and the first test is not measured again."""
    (tmp_path / "m.gguf").write_bytes(b"0" * 100)
    environment = os.environ | {"EDGEFORMER_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "m.gguf")]

    def run(how: str) -> subprocess.CompletedProcess[str]:
        here = str(Path(__file__).parent)
        return subprocess.run(
            [*command, how, here], capture_output=True, text=True, env=environment, timeout=120
        )

    assert run("kill").returncode == -signal.SIGKILL
    (kept,) = (tmp_path / "cache" / "bench").iterdir()
    units = [json.loads(line)["unit"] for line in kept.read_text().splitlines()]
    assert "2/speed:pp8" in units and "2/speed:tg16" not in units
    with kept.open("a") as file:
        file.write('{"unit": "2/speed:tg16", "da')  # what a kill in the middle of a line leaves
    again = run("on")
    assert again.returncode == 0, again.stderr
    rows = json.loads(again.stdout)
    assert [row["test"] for row in rows] == ["pp8", "pp8", "tg16", "tg16"]
    assert all(row["status"] == "ok" for row in rows) and len({row["run_id"] for row in rows}) == 1
    assert again.stderr.split()[-1] == "1"
    assert not list((tmp_path / "cache" / "bench").iterdir())


def row(**fields: Any) -> dict[str, Any]:
    return {
        "schema_version": 2, "kind": "model", "model": "m.gguf", "engine": "edgeformer", "test": "tg128",
        "test_kind": "tg", "tokens": 128, "depth": 0, "batch": 1, "threads": 2, "tokens_per_second": 10.0,
        "spread": 1.0, "limit_fraction": None, "samples": [9.0, 10.0, 11.0], "proof": "run",
    } | fields  # fmt: skip


@pytest.mark.parametrize("command", ["compare", "report"])
@pytest.mark.parametrize(
    ("text", "told"),
    [
        (json.dumps([row(schema_version=1)]), "different schema versions"),
        (json.dumps([row()])[:-9], "damaged"),
        (json.dumps([row(schema_version=7)]), "schema version 7"),
        ("\x00", "damaged"),
    ],
)
def test_files_that_do_not_fit_are_told_in_one_line(tmp_path: Path, command: str, text: str, told: str):
    (tmp_path / "good.json").write_text(json.dumps([row()]))
    (tmp_path / "bad.json").write_text(text)
    out = tmp_path / "page.html"
    more = ["-o", str(out)] if command == "report" else []
    files = [str(tmp_path / "good.json"), str(tmp_path / "bad.json")]
    found = RUNNER.invoke(cli.app, ["bench", command, *files, *more])
    assert found.exit_code == 2 and told in found.stderr
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1
    assert not out.exists()


def test_a_page_needs_no_display(tmp_path: Path):
    """A server without a screen, whose user has asked matplotlib for windows."""
    pytest.importorskip("matplotlib")
    (tmp_path / "rows.json").write_text(json.dumps([row()]))
    hidden = ("DISPLAY", "WAYLAND_DISPLAY")
    environment = {k: v for k, v in os.environ.items() if k not in hidden} | {"MPLBACKEND": "TkAgg"}
    code = "from edgeformer.cli import main; main()"
    arguments = ["bench", "report", "rows.json", "-o", "page.html", "--png", "plots"]
    found = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path,
        env=environment, timeout=120,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "<svg" in (tmp_path / "page.html").read_text() and list((tmp_path / "plots").glob("*.png"))
