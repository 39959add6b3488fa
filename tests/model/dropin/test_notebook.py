"""The notebook runs, cell by cell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import edgeformer

NOTEBOOK = Path(edgeformer.__file__).parent / "examples" / "optimize.ipynb"


def test_the_notebook_runs(capsys: Any) -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
    printed = capsys.readouterr().out
    assert "modules replaced" in printed and "likeliest token agrees" in printed
    assert "a decode step is one native call" in printed and printed.strip().endswith("own")
