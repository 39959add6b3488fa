"""The probes read every byte once and compute what they say; their speed is not tested."""

from __future__ import annotations

import math

import pytest
import torch

from edgeformer.compiler.target import detect
from edgeformer.kernels.probe import TVM_CPU, ProbeSpec
from edgeformer.kernels.probe.operations import (
    L1_STEPS,
    LINE_BYTES,
    MATRIX_STEPS,
    PIECE_LINES,
    TILE_STATE_BYTES,
    TILE_VECTORS,
    matrix_operations,
)
from edgeformer.kernels.shared.isa.table import MATRIX, by_name
from edgeformer.runtime import launch, probes

ISAS = [detect().isa, "portable"]


def library(isa: str):
    return launch.load_or_build("probe", TVM_CPU, ProbeSpec(), {}, detect().with_isa(isa))


@pytest.mark.parametrize("lines", [37, 40 * PIECE_LINES + 37])
@pytest.mark.parametrize("threads", [1, 2])
def test_read_visits_every_byte_once(threads: int, lines: int) -> None:
    data = torch.randint(-(2**31), 2**31 - 1, (lines * LINE_BYTES // 4 + 4096,), dtype=torch.int32)
    lanes = by_name(detect().isa).lanes
    out = torch.full((threads * 16 + 16,), -1, dtype=torch.int32)
    library(detect().isa).function("read")(threads, lines, data.data_ptr(), out.data_ptr())
    total = torch.zeros(lanes, dtype=torch.int32)
    for part in data[: lines * LINE_BYTES // 4].view(-1, lanes):
        total ^= part
    got = torch.zeros(lanes, dtype=torch.int32)
    for thread in range(threads):
        got ^= out[thread * 16 : thread * 16 + lanes]
    assert torch.equal(got, total)


@pytest.mark.parametrize("isa", ISAS)
def test_dot_and_multiply_add_do_the_operations_that_are_counted(isa: str) -> None:
    tile, lanes = by_name(isa).gemm_rows * TILE_VECTORS * L1_STEPS, by_name(isa).lanes
    codes = torch.ones(1 << 14, dtype=torch.uint8)
    out = torch.zeros(16, dtype=torch.int32)
    library(isa).function("dot")(1, 3, codes.data_ptr(), out.data_ptr())
    assert out[:lanes].tolist() == [3 * tile * 4] * lanes
    floats = torch.ones(1 << 14)
    result = torch.zeros(16)
    library(isa).function("multiply_add")(1, 3, floats.data_ptr(), result.data_ptr())
    assert result[:lanes].tolist() == [3.0 * tile] * lanes


@pytest.mark.parametrize("isa", sorted({detect().isa, "portable16"} & MATRIX))
def test_the_matrix_unit_does_the_operations_that_are_counted(isa: str) -> None:
    threads, rounds = 2, 3
    data = torch.ones(MATRIX_STEPS * 2048 + threads * TILE_STATE_BYTES // 2, dtype=torch.bfloat16)
    out = torch.full((threads, 4, 16, 16), torch.nan)
    library(isa).function("matrix")(threads, rounds, data.data_ptr(), out.data_ptr())
    total = threads * matrix_operations(rounds)
    assert out.double().sum().item() * 2 == total  # every product of ones is a multiplication and an addition
    assert (out == rounds * MATRIX_STEPS * 32).all()


def test_probes_return_rates() -> None:
    before = torch.get_num_threads()
    try:
        for rate in (probes.read_bandwidth(1, 8, 1), probes.int8_dot_peak(1, 1), probes.float_dot_peak(1, 1)):
            assert math.isfinite(rate)
            assert rate > 1e6
        peak = probes.matrix_peak(1, 1)
        assert (peak is not None and peak > 1e6) if detect().isa in MATRIX else peak is None
    finally:
        torch.set_num_threads(before)
