"""Random problems on every composition, memory that shows what was not written, and the comparison."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from edgeformer.compiler.target import ISA_FEATURES, Target, detect
from edgeformer.kernels.quant_matmul import (
    OPERATOR,
    TVM_CPU,
    CanonicalWeight,
    QuantMatmulSpec,
    WeightFormat,
    pack,
)
from edgeformer.kernels.quant_matmul.reference import quant_matmul as reference
from edgeformer.kernels.shared import scratch
from edgeformer.kernels.shared.isa.table import MATRIX
from edgeformer.runtime import launch

HERE = [*(name for name, needed in ISA_FEATURES if needed <= detect().features), "portable16"]
UNITS = [isa for isa in HERE if isa in MATRIX]  # with a bf16 matrix unit
FORMATS = {
    "int4": (WeightFormat.int4(), 100, 96),
    "int4-integer-64": (WeightFormat.int4(64, "integer"), 66, 130),
    "int4-minimum-128": (WeightFormat.int4(128, "minimum"), 98, 300),
    "int4-minimum": (WeightFormat.int4(zero="minimum"), 64, 70),
    "int4-128": (WeightFormat.int4(128), 34, 257),
    "int8": (WeightFormat.int8(), 90, 100),
    "int8-128": (WeightFormat.int8(128), 70, 140),
    "int8-constant-64": (WeightFormat.int8(64, "constant"), 36, 65),
    "int5": (WeightFormat("int", 5, 32, "float16", "constant"), 72, 70),
    "int5-minimum": (WeightFormat("int", 5, 32, "float16", "minimum"), 34, 100),
    "int4-blocked": (WeightFormat.blocked(4, 32), 66, 300),
    "int5-blocked": (WeightFormat.blocked(5, 32), 40, 256),
    "int6-blocked": (WeightFormat.blocked(6, 16, "constant"), 70, 520),
    "int2-blocked": (WeightFormat.blocked(2, 16), 36, 270),
    "int4-blocked-16": (WeightFormat.blocked(4, 16, "constant"), 36, 260),
    "int2": (WeightFormat("int", 2, 64, "float16", "constant"), 40, 192),
    "bfloat16": (WeightFormat.float("bfloat16"), 70, 99),
    "float16": (WeightFormat.float("float16"), 36, 45),
    "float32": (WeightFormat.float("float32"), 98, 64),
}
# Made of parts that others test: on half of the compositions, elsewhere slow.
MORE_FORMATS = {"int5", "int5-blocked", "int2-blocked", "int4-blocked-16"}
TOLERANCE = {
    torch.float32: 1e-5,
    torch.bfloat16: 2**-8 + 1e-5,
    torch.float16: 2**-11 + 1e-5,
}  # half a unit of y


@functools.cache
def bound(isa: str, spec: QuantMatmulSpec) -> Callable[..., torch.Tensor]:
    target = detect().with_isa(isa)
    return launch.bind(OPERATOR, TVM_CPU, spec, TVM_CPU.space(spec, target)[0], target)


def random_weight(spec: QuantMatmulSpec) -> CanonicalWeight:
    return CanonicalWeight.from_float(torch.randn(spec.n, spec.k), spec.weight)


def extreme_weight(spec: QuantMatmulSpec) -> CanonicalWeight:
    """Codes at the ends of their range only."""
    weight = random_weight(spec)
    ends = (-128, 127) if spec.weight.zero == "none" else (0, (1 << spec.weight.bits) - 1)
    ends = tuple(torch.tensor(end, dtype=weight.codes.dtype) for end in ends)
    codes = torch.where(torch.rand(spec.n, spec.k) < 0.5, *ends)
    codes[0], codes[1] = ends
    return dataclasses.replace(weight, codes=codes)


def inputs(spec: QuantMatmulSpec, m: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    dtype = getattr(torch, spec.x_dtype)
    x = torch.randn(m, spec.k).to(dtype)
    bias = torch.randn(spec.n) if spec.bias else None
    return x, bias, torch.randn(m, spec.n_out).to(dtype) if spec.residual else None


class Guarded:
    """Outputs and scratch start as NaN; each output lies between canaries."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._empty, self._raw = torch.empty, []
        monkeypatch.setattr(torch, "empty", self._make)

    def _make(self, *shape: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if dtype == torch.uint8:  # scratch: 0xff bytes are NaN in every float type
            return self._empty(*shape, dtype=dtype).fill_(255)
        size = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
        raw = self._empty(size.numel() + 256, dtype=dtype).fill_(torch.nan)
        self._raw.append(raw)
        return raw[128 : 128 + size.numel()].view(size)

    def prepare(self) -> None:
        """Poison what an earlier call left in the scratch memory."""
        held = scratch.local.buffer
        if held is not None:
            held.fill_(255)

    def check(self) -> None:
        for raw in self._raw:
            assert raw[:128].isnan().all() and raw[-128:].isnan().all(), "written outside of the output"
        self._raw.clear()


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Guarded:
    return Guarded(monkeypatch)


def assert_rows_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Compare y in any type with an fp32 reference, row by row."""
    assert got.shape == want.shape
    a, b = got.double(), want.double()
    error = (a - b).norm(dim=1) / b.norm(dim=1).clamp_min(1e-30)
    assert (error <= TOLERANCE[got.dtype]).all(), (
        f"relative error {error.max():.2e} in row {int(error.argmax())}"
    )


def compare(
    isa: str, spec: QuantMatmulSpec, weight: CanonicalWeight, rows: tuple[int, ...], guarded: Guarded
) -> None:
    compare_call(bound(isa, spec), detect().with_isa(isa), spec, weight, rows, guarded)


def compare_call(
    call: Callable[..., torch.Tensor],
    target: Target,
    spec: QuantMatmulSpec,
    weight: CanonicalWeight,
    rows: tuple[int, ...],
    guarded: Guarded,
) -> None:
    packed = pack(weight, target, pair=spec.pair)
    for m in rows:
        x, bias, residual = inputs(spec, m)
        guarded.prepare()
        got = call(x, packed, bias, residual)
        guarded.check()
        assert got.dtype == x.dtype
        assert_rows_close(
            got, reference(spec, x.float(), weight, bias, None if residual is None else residual.float())
        )
