"""Files of rows: what is read, and what a damaged or foreign file is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeformer.bench.result_files import engines, read_all, read_results
from edgeformer.compiler.errors import EdgeFormerError, FormatError


def row(**fields: Any) -> dict[str, Any]:
    return {
        "schema_version": 2, "engine": "edgeformer", "test": "tg128", "tokens_per_second": 10.0,
        "spread": 1.0, "limit_fraction": None, "samples": [9.0, 10.0, 11.0],
    } | fields  # fmt: skip


def test_a_list_and_lines_are_the_same(tmp_path: Path):
    rows = [row(), row(engine="llama.cpp", tokens_per_second=None, samples=[])]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert read_results(tmp_path / "a.json").rows == read_results(tmp_path / "b.jsonl").rows == rows
    assert engines(reversed(rows)) == ["edgeformer", "llama.cpp"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no rows"),
        ("[]", "no rows"),
        ("[{", "damaged"),
        (json.dumps(row()) + "\n{torn", "line 2"),
        ("[1]", "row 1 .* is a int"),
        (json.dumps([{"engine": "x"}]), "lacks test, tokens_per_second"),
        (json.dumps([row(schema_version=99)]), "schema version 99; this EdgeFormer reads 1 to 2"),
        (json.dumps([row(schema_version="2")]), "schema version '2'"),
        (json.dumps([row(tokens_per_second=-1)]), "a speed of -1"),
        (json.dumps([row(tokens_per_second="fast")]), "a speed of 'fast'"),
        (json.dumps([row(samples=[1, "x"])]), "samples that are no speeds"),
        (json.dumps([row(ratios=[1.0])]), "ratios that are none"),
        (
            json.dumps([row(ratios={"a": {"ratio": 1.0, "low": 1.0, "high": 1.0, "pairs": []}})]),
            "ratios that",
        ),
        (
            json.dumps([row(ratios={"a": {"ratio": 1.0, "low": None, "high": 1.0, "pairs": [1]}})]),
            "ratios that",
        ),
        ("[" * 100_000, "damaged"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, match: str):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=match):
        read_results(path)


def test_missing_and_binary_files(tmp_path: Path):
    with pytest.raises(FormatError, match="No such file"):
        read_results(tmp_path / "nothing.json")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="not text"):
        read_results(tmp_path / "b.json")


def test_mixed_schema_versions_are_refused(tmp_path: Path):
    for version in (1, 2):
        (tmp_path / f"v{version}.json").write_text(json.dumps([row(schema_version=version)]))
    with pytest.raises(FormatError, match=r"different schema versions .*v1.json: 1; .*v2.json: 2"):
        read_all([tmp_path / "v1.json", tmp_path / "v2.json"])
    assert read_all([tmp_path / "v1.json"])[0].rows


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
@settings(max_examples=60, deadline=None)
def test_noise_is_told_and_never_crashes(tmp_path_factory: pytest.TempPathFactory, noise: bytes):
    path = tmp_path_factory.mktemp("noise") / "n.json"
    path.write_bytes(noise)
    with pytest.raises(EdgeFormerError):
        read_results(path)
