"""The commands on the real model, as a person runs them: in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real


def edgeformer(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgeformer.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)


def test_run_answers_paris(smollm2: Path):
    question = ("run", str(smollm2), "-p", "What is the capital of France?", "-n", "16", "-c", "256")
    result = edgeformer(*question, "--activation", "float", "--report")
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert "tokens/s" not in result.stdout
    assert "decode" in result.stderr
    assert "layers.0-29.qkv" in result.stderr


def test_a_prompt_longer_than_the_context_is_refused(smollm2: Path):
    result = edgeformer(
        "run", str(smollm2), "-p", "one two three four five six seven eight", "--raw", "-c", "4"
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr


def test_bench_prints_rows(smollm2: Path):
    small = ("-p", "8", "-n", "2", "-b", "1,2", "-r", "1", "--quality-tokens", "48")
    result = edgeformer("bench", "model", str(smollm2), *small, "-o", "json")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [row["test"] for row in rows] == ["pp8", "tg2", "tg2@b2"]
    for row in rows:
        assert row["engine"] == "edgeformer"
        assert row["tokens_per_second"] > 0
        assert {"spread", "limit_fraction", "schema_version", "run_id", "size", "threads"} <= row.keys()
        assert row["first_token"]["cold_seconds"] > row["first_token"]["warm_seconds"] > 0
        assert row["peak_memory"] > row["size"]
        assert row["quality"]["tokens"] == 47 and row["quality"]["mean_kl"] < 0.1
        assert row["energy"]["status"] in ("measured", "unavailable")
