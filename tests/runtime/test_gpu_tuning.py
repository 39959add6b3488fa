"""Tuning GPU kernels without a GPU: ranked by machine code in a child, kept as records that say so."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgeformer.compiler.backends.triton_gpu import ARCHITECTURES
from edgeformer.compiler.errors import DeviceError, TargetError, UnsupportedError
from edgeformer.compiler.records import RecordStore
from edgeformer.kernels.shared import gpu_defaults
from edgeformer.runtime import dispatch, gpu_tiles, gpu_tuning

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="compiles with Triton, which is not installed or interprets",
)


@pytest.fixture(autouse=True)
def fresh():
    gpu_tiles.forget()
    yield
    gpu_tiles.forget()


@needs_triton
def test_a_tile_is_ranked_without_a_device(cache: Path) -> None:
    (outcome,) = gpu_tuning.tune("gfx1201", ["mla"], seconds=200, most_trials=2)
    assert outcome.state == "tuned" and outcome.trials == 2 and outcome.note.startswith("ranked by its code")
    record = outcome.record
    assert record is not None and (record.source, record.seconds, record.mcpu) == ("static", 0.0, "gfx1201")
    assert [r for r, origin in RecordStore().all() if origin == "yours"] == [record]
    (again,) = gpu_tuning.tune("gfx1201", ["mla"], seconds=200)
    assert again.state == "kept" and again.trials == 0


def put(arch: str, tile: str, **change: int) -> None:
    entry = ARCHITECTURES[arch]
    chosen = {**gpu_tiles.space(tile, entry).default, **change}
    RecordStore().put(gpu_tiles.wanted(tile, entry).empty(chosen))


def test_records_choose_tiles_and_reports_say_which(cache: Path) -> None:
    entry = ARCHITECTURES["gfx1151"]
    first = gpu_defaults.default("attention_decode", "rdna3", "gfx1151")
    assert gpu_tiles.chosen("attention_decode", entry) == first
    gpu_tiles.forget()
    put("gfx1151", "attention_decode", BLOCK_N=64)
    assert gpu_tiles.chosen("attention_decode", entry)["BLOCK_N"] == 64
    (choice,) = [c for c in dispatch.choices() if c.spec == "attention_decode on gfx1151"]
    assert (choice.form, choice.backend, choice.operator) == ("triton", "triton_gpu", "attention")
    assert "exact record" in choice.record
    # A device of the family takes it too; one of another family does not.
    assert gpu_tiles.chosen("attention_decode", ARCHITECTURES["gfx1100"])["BLOCK_N"] == 64
    other = gpu_tiles.chosen("attention_decode", ARCHITECTURES["gfx1201"])
    assert other == gpu_defaults.default("attention_decode", "rdna4", "gfx1201")


def test_a_record_that_does_not_fit_is_left_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ARCHITECTURES["gfx1151"]
    put("gfx1151", "matvec", BLOCK_N=48)  # no member of the space
    assert gpu_tiles.chosen("matvec", entry) == gpu_defaults.default("matvec", "rdna3", "gfx1151")
    put("gfx1151", "matmul", BLOCK_M=32)
    monkeypatch.setenv("EDGEFORMER_TUNE", "off")
    assert gpu_tiles.chosen("matmul", entry) == gpu_defaults.default("matmul", "rdna3", "gfx1151")


def test_trials_take_their_own_tile() -> None:
    entry = ARCHITECTURES["gfx1151"]
    with gpu_tiles.using("matmul", {"BLOCK_M": 1}):
        with gpu_tiles.using("matmul", {"BLOCK_M": 2}):
            assert gpu_tiles.chosen("matmul", entry) == {"BLOCK_M": 2}
        assert gpu_tiles.chosen("matmul", entry) == {"BLOCK_M": 1}
    assert gpu_tiles.chosen("matmul", entry) != {"BLOCK_M": 1}


def test_what_cannot_be_tuned_is_named() -> None:
    with pytest.raises(TargetError, match=r"gfx803.*PyTorch"):
        gpu_tuning.architecture("gfx803")
    with pytest.raises(UnsupportedError, match="unknown operators convolution; on a GPU: attention"):
        gpu_tuning.problems(ARCHITECTURES["gfx942"], ["convolution"])
    with pytest.raises(DeviceError, match="no xpu device"):
        gpu_tuning.architecture("xpu")
    assert gpu_tuning.architecture("rx-9070-xt")[0].name == "gfx1201"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["tune", "--target", "gfx803"], "gfx803"),
        (["tune", "model.gguf", "--target", "sm_90"], "without a MODEL"),
        (["tune", "--target", "sm_90", "--operators", "norm"], "unknown operators norm"),
        (["bench", "ops", "--target", "xpu"], "no xpu device"),
        (["bench", "ops", "--target", "cuda", "-m", "8"], "its shapes are its own"),
    ],
)
def test_the_commands_refuse_in_one_line(arguments: list[str], text: str) -> None:
    command = [sys.executable, "-m", "edgeformer.cli", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 2 and text in found.stderr and len(found.stderr.strip().splitlines()) == 1
