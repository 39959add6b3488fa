"""The README's benchmark section is what the reviewed results say."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgeformer
from edgeformer.bench.readme import BEGIN, END, replaced, reviewed, section
from edgeformer.compiler.errors import FormatError

ROOT = Path(edgeformer.__file__).resolve().parent


def test_the_readme_agrees_with_the_results():
    if not (ROOT / "bench" / "results").is_dir():
        pytest.skip("a source distribution has no results")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    results = reviewed(ROOT / "bench" / "results")
    assert replaced(text, section(results)) == text, "run `make readme-bench`"
    for line in text[text.index(BEGIN) : text.index(END)].splitlines():
        for part in line.split("](")[1:]:
            assert (ROOT / part.split(")")[0]).exists()


def test_every_result_has_its_provenance():
    if not (ROOT / "bench" / "results").is_dir():
        pytest.skip("a source distribution has no results")
    for result in reviewed(ROOT / "bench" / "results"):
        for row in result.rows:
            assert row["proof"] in ("run", "none") and row["fingerprint"] and row["commit"]
            assert not row["commit"].endswith("+"), f"{result.path.name} was measured on changed files"


def test_the_text_around_the_section_stays():
    text = f"before\n{BEGIN}\nold\n{END}\nafter"
    assert replaced(text, "new") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter"
    assert replaced(replaced(text, "new"), "new") == replaced(text, "new")
    with pytest.raises(FormatError, match="no markers"):
        replaced("nothing here", "new")
    with pytest.raises(FormatError, match="no results"):
        reviewed(Path("/nonexistent"))
