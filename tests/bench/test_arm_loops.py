"""Arm's inner loops keep their marks: instructions per 128 bytes of weights, llvm-mca's share of the peak."""

from __future__ import annotations

import shutil

import pytest

from edgeformer.bench import arm_loops

needs_mca = pytest.mark.skipif(
    not any(shutil.which(tool) for tool in arm_loops.MCA),
    reason="llvm-mca is missing: apt-get install llvm-19",
)


@pytest.mark.parametrize(("target", "cpu"), arm_loops.MODELS)
def test_int4_decode_unpacks_with_one_instruction_a_dot(target: str, cpu: str) -> None:
    loop = arm_loops.inner_loop(target, "INT4 decode")
    assert loop.dots <= 16 and loop.unpack <= 16 and loop.stack == 0
    assert loop.loads + loop.other <= 10


@needs_mca
@pytest.mark.parametrize(("target", "cpu"), arm_loops.MODELS)
def test_the_int8_tile_fills_the_dot_pipes(target: str, cpu: str) -> None:
    loop = arm_loops.inner_loop(target, "INT8 tile")
    assert loop.stack == 0 and arm_loops.share_of_peak(loop, cpu) >= 0.9


@needs_mca
def test_the_table_has_a_row_for_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    arm_loops.main()
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(arm_loops.MODELS) * len(arm_loops.CASES)
