"""Comparing runs: what counts as a regression, and what is noise, the machine, or another device."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgeformer import cli
from edgeformer.bench.compare import compare, interval, render
from edgeformer.bench.result_files import Results

RUNNER = CliRunner()


def row(
    samples: list[float], *, test: str = "tg128", engine: str = "edgeformer", **fields: Any
) -> dict[str, Any]:
    middle = sorted(samples)[len(samples) // 2] if samples else None
    return {
        "schema_version": 2, "kind": "model", "model": "m.gguf", "engine": engine, "test": test, "threads": 2,
        "tokens_per_second": middle, "spread": (max(samples) - min(samples)) / 2 if samples else None,
        "samples": samples, "limit_fraction": 0.5, "proof": "run", "fingerprint": "f",
        "device_check": {"warnings": [], "probes": [{"compute": 100.0}]},
    } | fields  # fmt: skip


def results(label: str, *rows: dict[str, Any]) -> Results:
    return Results(Path(f"{label}.json"), label, list(rows))


BASE = [100.0, 101.0, 99.0, 100.5, 99.5]


def verdict(new: list[float], **fields: Any) -> str:
    return compare(results("a", row(BASE)), results("b", row(new, **fields)))[0].verdict


def test_a_clear_change_is_told():
    assert verdict([s * 0.8 for s in BASE]) == "slower"
    assert verdict([s * 1.2 for s in BASE]) == "faster"
    assert verdict([s * 0.98 for s in BASE]) == "same"


def test_noise_is_no_regression():
    assert verdict([95.0, 110.0, 92.0, 80.0, 99.0]) == "unsure"
    wide = compare(results("a", row([60.0, 100.0, 140.0])), results("b", row([55.0, 80.0, 130.0])))[0]
    assert wide.verdict == "unsure"


def test_what_the_machine_lost_is_no_regression():
    slow = [s * 0.8 for s in BASE]
    probes = {"warnings": [], "probes": [{"compute": 80.0}]}
    assert verdict(slow, device_check=probes) == "unsure"
    probes = {"warnings": [], "probes": [{"compute": 95.0}]}
    assert verdict(slow, device_check=probes) == "slower"


def test_a_test_that_fails_now_is_a_regression_and_a_new_one_is_not():
    failed = row([], engine="edgeformer", status="failed", proof="none")
    change = compare(results("a", row(BASE)), results("b", failed))[0]
    assert (change.verdict, change.regressed) == ("gone", True)
    changes = compare(results("a", row(BASE)), results("b", row(BASE), row(BASE, test="pp512")))
    assert [(c.test, c.verdict) for c in changes] == [("tg128", "same"), ("pp512", "new")]
    assert not changes[1].regressed


def test_no_speed_of_a_kernel_that_did_not_run_is_compared():
    change = compare(results("a", row(BASE)), results("b", row(BASE, proof="compiled")))[0]
    assert change.new is None and change.verdict == "gone"


def test_the_interval_holds_the_ratio_and_is_repeatable():
    low, high = interval(row(BASE), row([s * 1.1 for s in BASE]))
    assert low < 1.1 < high
    assert interval(row(BASE), row([s * 1.1 for s in BASE])) == (low, high)


def with_pairs(label: str, pairs: list[float], samples: list[float], version: str = "1") -> Results:
    ratios = {"llama.cpp": {"ratio": sorted(pairs)[len(pairs) // 2], "low": 1.0, "high": 9.0, "pairs": pairs}}
    theirs = row(BASE, engine="llama.cpp", engine_details={"version": version})
    return results(label, row(samples, ratios=ratios), theirs)


PAIRS = [4.0, 4.04, 3.96, 4.02, 3.98, 4.01]


def test_the_ratio_to_a_peer_decides_where_there_are_pairs():
    """A machine at half its speed is no regression; a lost tenth beside the peer is one, on any machine."""
    slow = [s * 0.5 for s in BASE]
    base = with_pairs("a", PAIRS, BASE)
    change = compare(base, with_pairs("b", [p * 1.001 for p in PAIRS], slow))[0]
    assert (change.verdict, change.peer) == ("same", "llama.cpp")
    assert change.ratio == pytest.approx(0.5) and change.of_peer == pytest.approx(1.001)
    change = compare(base, with_pairs("b", [p * 0.9 for p in PAIRS], [s * 1.5 for s in BASE]))[0]
    assert change.regressed and change.peer_high is not None and change.peer_high < 1
    wide = [2.0, 5.0, 3.0, 6.0, 3.5, 3.6]
    assert compare(base, with_pairs("b", wide, slow))[0].verdict == "unsure"


PARTS = [0.90, 0.91, 0.89, 0.905, 0.895]


def test_the_part_of_the_limit_decides_where_there_is_no_peer():
    """Half the speed of half the memory is no regression; a lost tenth of the limit is one."""
    slow = [s * 0.5 for s in BASE]
    base = results("a", row(BASE, of_limit={"samples": PARTS}))
    change = compare(base, results("b", row(slow, of_limit={"samples": [p * 1.01 for p in PARTS]})))[0]
    assert (change.verdict, change.ratio) == ("same", 0.5)
    assert change.limit_low is not None and change.limit_low < 1.01 < (change.limit_high or 0)
    worse = results("b", row(BASE, of_limit={"samples": [p * 0.9 for p in PARTS]}))
    assert compare(base, worse)[0].regressed and "0.900 (0.8" in render(base, [worse], 0.03, "md")[0]
    other = results("b", row(slow, of_limit={"samples": PARTS}, limit="another"))
    assert compare(base, other)[0].verdict == "slower"  # parts of two limits do not compare


def test_the_peer_and_the_limit_have_to_agree_in_a_change():
    """Two runs of one version on a machine that changed between them; then a real loss, and a real gain."""

    def run(label: str, beside_peer: float, of_limit: float) -> Results:
        found = with_pairs(label, [p * beside_peer for p in PAIRS], BASE)
        found.rows[0]["of_limit"] = {"samples": [p * of_limit for p in PARTS]}
        return found

    base = run("a", 1.0, 1.0)
    verdicts = {
        (peer, limit): compare(base, run("b", peer, limit))[0].verdict
        for peer, limit in ((0.93, 1.01), (0.9, 0.9), (1.1, 1.1), (1.1, 0.9), (1.0, 0.9))
    }
    assert list(verdicts.values()) == ["unsure", "slower", "faster", "unsure", "same"]


def test_a_peer_of_another_version_is_no_measure():
    slow = [s * 0.8 for s in BASE]
    change = compare(with_pairs("a", PAIRS, BASE), with_pairs("b", PAIRS, slow, version="2"))[0]
    assert (change.peer, change.verdict) == ("", "slower")


def test_a_peers_own_change_is_not_judged_by_ours():
    changes = compare(with_pairs("a", PAIRS, BASE), with_pairs("b", [8.0] * 6, BASE))
    assert [(c.engine, c.verdict) for c in changes] == [("edgeformer", "faster"), ("llama.cpp", "same")]


@pytest.mark.parametrize("form", ["md", "csv", "json", "jsonl"])
def test_forms(form: str):
    text, regressed = render(results("a", row(BASE)), [results("b", row([80.0, 81.0, 79.0]))], 0.03, form)
    assert regressed
    if form == "md":
        assert "| m.gguf | tg128 | edgeformer | 100.0 | 80.0 | 0.800 |" in text and "slower" in text
        return
    if form == "csv":
        found = next(csv.DictReader(io.StringIO(text)))
    else:
        found = json.loads(text)[0] if form == "json" else json.loads(text)
    assert found["verdict"] == "slower" and float(found["ratio"]) == 0.8


def test_exit_codes(tmp_path: Path):
    files = {"base": BASE, "same": BASE, "slow": [s * 0.7 for s in BASE]}
    for name, samples in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([row(samples)]))
    other = row([s * 0.5 for s in BASE], fingerprint="another device")
    (tmp_path / "other.json").write_text(json.dumps([other]))
    (tmp_path / "damaged.json").write_text("[{")

    def run(*names: str) -> Any:
        return RUNNER.invoke(cli.app, ["bench", "compare", *(str(tmp_path / f"{n}.json") for n in names)])

    assert run("base", "same").exit_code == 0
    assert run("base", "same", "slow").exit_code == 1
    crossing = run("base", "other")
    assert crossing.exit_code == 0 and "Different devices" in crossing.stdout
    damaged = run("base", "damaged")
    assert damaged.exit_code == 2 and damaged.stderr.startswith("error: ") and "damaged" in damaged.stderr
