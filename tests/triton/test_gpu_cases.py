"""The problems that tuning and benchmarks run on a GPU, at small sizes in the interpreter: all right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgeformer.bench.gpu_ops import OURS, GpuOptions, bench_gpu, render_gpu, speeds
from edgeformer.compiler.errors import UnsupportedError
from edgeformer.compiler.journal import GOOD
from edgeformer.kernels.shared import gpu_defaults
from edgeformer.kernels.shared.gpu_spaces import OPERATORS
from edgeformer.runtime import gpu_tiles, gpu_trial
from edgeformer.runtime.gpu_cases import Box, Case, cases
from edgeformer.runtime.gpu_trial import GpuRequest, Runs, answer


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's time grows with the tile, not with the problem."""
    table = {
        kernel: {
            f: {n: min(v, 16) if n.startswith("BLOCK") else v for n, v in t.items()} for f, t in tiles.items()
        }
        for kernel, tiles in gpu_defaults._TABLE.items()
    }
    monkeypatch.setattr(gpu_defaults, "_TABLE", table)
    monkeypatch.setattr(gpu_defaults, "_BY_ARCHITECTURE", {})
    gpu_tiles.forget()


def test_every_case_is_right_beside_its_peers() -> None:
    rows = bench_gpu(GpuOptions("cpu"))
    wrong = [(row["test"], row["engine"], row["error"]) for row in rows if row["status"] != "right"]
    assert not wrong
    ours = [row for row in rows if row["engine"] == OURS]
    assert {row["operator"] for row in ours} >= set(OPERATORS.values()) | {"norm", "rope", "gated_silu"}
    assert all(row["seconds"] is None for row in rows)  # the interpreter's times mean nothing
    assert render_gpu(rows, "md").count("\n") == len(rows) + 1


def test_every_tile_has_a_case() -> None:
    # The wide head size has a case at real sizes alone: its tile is the narrow one's kernel.
    tiles = {case.tile for case in cases(Box("cpu", torch.float16, small=True))}
    assert tiles | {"attention_forward_256"} == set(OPERATORS) | {""}


def test_one_operator_alone_and_an_unknown_one() -> None:
    rows = bench_gpu(GpuOptions("cpu", ("rope",)))
    assert {row["operator"] for row in rows} == {"rope"}
    with pytest.raises(UnsupportedError, match="unknown operators softmax"):
        bench_gpu(GpuOptions("cpu", ("softmax",)))


def test_a_wrong_kernel_is_no_trial_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_trial, "_REPEATS", 1)
    runs = Runs("matvec", "cpu")
    runs.cases = runs.cases[:1]
    good = gpu_defaults.default("matvec", "rdna3")
    assert runs.trial(good, good).status == GOOD
    case = runs.cases[0]
    monkeypatch.setattr(case, "run", lambda: case.truth() * 1.1)
    found = runs.trial(good, good)
    assert found.status == "wrong" and case.name in found.note
    monkeypatch.setattr(case, "run", lambda: torch.full_like(case.truth(), torch.nan))
    assert runs.trial(good, good).status == "wrong"


def test_a_request_is_answered_on_a_device() -> None:
    request = GpuRequest("compare", "sparse_mlp", "gfx1151", "cpu", ({"num_warps": 4}, {"num_warps": 8}), 2)
    found = answer(request)
    assert not isinstance(found, Case) and len(found.samples) == 2  # pyright: ignore
    assert all(sample.seconds > 0 for sample in found.samples)  # pyright: ignore


def test_figures_of_a_timed_call() -> None:
    case: Any = Case("c", "o", "", torch.Tensor, torch.Tensor, nbytes=2e9, operations=0.0)
    rates = {"copy_bytes_per_second": 4e12, "gemm_flops": 1e15}
    found = speeds(case, [2e-3, 1e-3, 1e-3, 1e-3, 1e-3], 5e-4, rates)
    figures = (found["terabytes_per_second"], found["of_copy"], found["speedup"])
    assert figures == pytest.approx((2.0, 0.5, 2.0))
    assert "teraflops" not in found
