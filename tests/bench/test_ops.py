"""`bench ops`: cases, limits, and rows; no speed for a target that this host cannot run."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edgeformer.bench import ops as bench_ops_module
from edgeformer.bench.op_cases import BUILDERS, cases, shapes
from edgeformer.bench.op_table import render_ops
from edgeformer.bench.ops import OpsOptions, _limits, bench_ops, interleave
from edgeformer.bench.probes import Limits
from edgeformer.compiler.errors import UnsupportedError
from edgeformer.compiler.target import Target, detect, known_targets

LIMITS = Limits(threads=2, read_bandwidth=1e10, int8_peak=1e12, float_peak=1e11, matrix_peak=2e12)
SMALL = {
    "hidden": 64,
    "intermediate": 96,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 32,
    "vocab": 128,
    "layers": 2,
}
LATENT = {"mla": {"heads": 2, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
                  "v_head_dim": 16}, "layers": 2}  # fmt: skip


def test_shapes_are_those_of_the_models():
    known = shapes()
    assert {"smollm2-135m", "qwen2.5-0.5b", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"} <= known.keys()
    big = known["llama-3.1-8b"]
    linear = big["hidden"] * (
        (2 * big["heads"] + 2 * big["kv_heads"]) * big["head_dim"] + 3 * big["intermediate"]
    )
    total = big["layers"] * linear + 2 * big["vocab"] * big["hidden"]
    assert 7.9e9 < total < 8.1e9
    assert known["deepseek-v2-lite"]["mla"]["kv_lora_rank"] == 512


def test_cases_cover_operators_rows_and_contexts():
    models = ("smollm2-135m", "deepseek-v2-lite")
    found = list(cases(tuple(BUILDERS), models, (1, 4096), (512, 32768), ("int4",), None, 1 << 25))
    names = [case.name for case in found]
    assert len(set(names)) == len(names)
    assert "quant_matmul smollm2-135m gate_up 3072x576 int4 m4096" in names
    assert "attention smollm2-135m 9/3x64 bf16 m1 ctx32768" in names
    assert "mla deepseek-v2-lite 16 heads bf16 m512 ctx512" in names
    assert not any("head 49152x576 int4 m4096" in name for name in names)  # logits of one token only
    with pytest.raises(UnsupportedError, match="no operator 'conv'"):
        list(cases(("conv",), models, (1,), (1,), ("int4",), None, 0))
    with pytest.raises(UnsupportedError, match="no shapes of 'gpt-9'"):
        list(cases(("norm",), ("gpt-9",), (1,), (1,), ("int4",), None, 0))


def test_engines_take_turns():
    log: list[str] = []
    found = interleave({"a": lambda: log.append("a"), "b": lambda: log.append("b")}, repeats=3)
    assert {name: len(samples) for name, samples in found.items()} == {"a": 3, "b": 3}
    changes = [name for name, before in zip(log, [None, *log], strict=False) if name != before]
    assert "".join(changes) == "ababab"  # both warmed up, then a b, b a, a b


def test_the_limit_is_the_slower_of_memory_and_operations():
    row = {"seconds": 1.0, "peak": "int8", "operations": 5e11, "bytes_per_step": 1e9, "cached": False}
    assert _limits(row, LIMITS)["limit_fraction"] == pytest.approx(0.25)
    found = _limits(row | {"bytes_per_step": 8e9}, LIMITS)
    assert found["limit_fraction"] == pytest.approx(0.8) and "bytes" in found["limit"]
    above = _limits(row | {"operations": 3e12, "warnings": ["few"]}, LIMITS)
    assert above["warnings"][0] == "few" and "150% of the measured limit" in above["warnings"][1]
    cached = _limits(row | {"bytes_per_step": 8e9, "cached": True}, LIMITS)
    assert cached["limit_fraction"] is None and "cache" in cached["limit"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch):
    """Small shapes, short samples, limits that are given."""
    known = {"small": SMALL, "latent": LATENT}
    monkeypatch.setattr("edgeformer.bench.op_cases.shapes", lambda: known)
    monkeypatch.setattr(bench_ops_module, "measure_limits", lambda threads, **_: LIMITS)
    monkeypatch.setattr(bench_ops_module, "fixed_probe", lambda threads: {"compute": 1.0})
    monkeypatch.setattr(bench_ops_module, "SAMPLE_SECONDS", 1e-5)
    monkeypatch.setattr("edgeformer.bench.check.IDLE_WINDOW", 0.0)


@pytest.mark.real
@pytest.mark.parametrize("operators", [("quant_matmul", "norm", "rope"), ("attention", "mla"),
                                       ("embedding", "sampling")])  # fmt: skip
def test_real_operators_are_right_and_have_peers(quick: None, operators: tuple[str, ...]):
    options = OpsOptions(operators, ("small", "latent"), rows=(1, 5), contexts=(48,), repeats=3)
    rows: list[dict[str, Any]] = bench_ops(options)
    assert {row["operator"] for row in rows} == set(operators)
    for row in rows:
        assert row["status"] == "ok" and row["tokens_per_second"] > 0, row["error"]
        assert row["schema_version"] == 2 and len(row["samples"]) == 3
        if row["engine"] == "edgeformer":
            assert row["error_to_reference"] <= 0.02 and row["peer_ratio"] > 0
        else:
            assert row["engine"].startswith("torch")
    assert json.loads(render_ops(rows, "json")) == rows
    assert "| edgeformer |" in render_ops(rows, "md")


@pytest.mark.real
def test_forms_are_asked_for_by_name(quick: None):
    """Each has rows of its own beside the peer, and one that there is not says so in its row."""
    options = OpsOptions(("norm",), ("small",), rows=(5,), forms=("", "reference", "hexagon"), repeats=3)
    rows = {row["engine"]: row for row in bench_ops(options) if row["engine"].startswith("edgeformer")}
    status = {engine: row["status"] for engine, row in rows.items()}
    assert status == {"edgeformer": "ok", "edgeformer reference": "ok", "edgeformer hexagon": "failed"}
    assert "no such form" in rows["edgeformer hexagon"]["error"]


def test_a_target_that_cannot_run_here_has_no_speed(quick: None):
    foreign = next(n for n in known_targets() if Target.parse(n).missing_on(detect()))
    options = OpsOptions(("quant_matmul", "norm"), ("small",), rows=(1,), target=foreign)
    rows = bench_ops(options)
    assert rows and all(row["tokens_per_second"] is None and row["seconds"] is None for row in rows)
    assert {row["proof"] for row in rows} <= {"compiled", "none"}
    assert any(row["status"] == "compiled, not run here" for row in rows)
    table = render_ops(rows, "md")
    assert "compiled, not run here" in table and "±" not in table
