"""Every weight format on an OpenCL device against the reference, at odd sizes, on outputs filled with NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgeformer.compiler.target import Target
from edgeformer.kernels.quant_matmul import OPERATOR, CanonicalWeight, QuantMatmulSpec, WeightFormat, pack
from edgeformer.kernels.quant_matmul.reference import quant_matmul
from edgeformer.kernels.shared.device_check import difference
from edgeformer.runtime import dispatch, opencl

FORMATS = [
    *(WeightFormat.int4(g, zero) for g, zero in ((32, "constant"), (32, "minimum"), (64, "integer"))),
    WeightFormat.int4(128, scale_dtype="float32"),
    WeightFormat.int4(32, scale_dtype="bfloat16"),
    WeightFormat.int8(),
    WeightFormat.int8(64, "minimum"),
    WeightFormat("int", 2, 32, "float16", "minimum"),
    WeightFormat("int", 5, 32, "float16", "constant"),
    *(WeightFormat.blocked(bits, group, zero) for bits, group, zero in (
        (4, 32, "minimum"), (5, 32, "minimum"), (6, 16, "constant"))),
    *(WeightFormat.float(name) for name in ("float32", "bfloat16", "float16")),
]  # fmt: skip


def run(device: Any, target: Target, spec: QuantMatmulSpec, m: int, seed: int = 0) -> float:
    """Return the difference from the reference."""
    torch.manual_seed(seed)
    _, choice = dispatch.choose(OPERATOR, spec, target, "tvm_opencl")
    call = opencl.bind(OPERATOR, OPERATOR.form("tvm_opencl"), spec, choice.configuration, target)
    weight = pack(
        CanonicalWeight.from_float(torch.randn(spec.n, spec.k), spec.weight), target, pair=spec.pair
    )
    x = torch.randn(m, spec.k)
    bias = torch.randn(spec.n) if spec.bias else None
    residual = torch.randn(m, spec.n_out) if spec.residual else None
    y = device.upload(torch.full((m, spec.n_out), torch.nan))
    extras = [None if t is None else device.upload(t).buffer for t in (bias, residual)]
    call(device.upload(x).buffer, device.upload(weight.buffer).buffer, *extras, y.buffer, m)
    return difference(y.read(), quant_matmul(spec, x, weight.unpack(), bias, residual))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.key())
def test_every_format_at_odd_sizes(device: Any, target: Target, fmt: WeightFormat) -> None:
    for n, k in ((77, 256), (33, 147)):
        spec = QuantMatmulSpec(n, k, fmt, "float")
        for m in (1, 3, 8, 9, 67):
            assert run(device, target, spec, m, m) < 1e-5, (n, k, m)


@pytest.mark.parametrize("epilogue", ["silu_pair", "gelu_pair"])
def test_epilogues(device: Any, target: Target, epilogue: str) -> None:
    spec = QuantMatmulSpec(
        2 * 45, 96, WeightFormat.int4(), "float", epilogue=epilogue, bias=True, residual=True
    )
    for m in (1, 2, 17):
        assert run(device, target, spec, m) < 1e-5
    capped = QuantMatmulSpec(45, 96, WeightFormat.int8(), "float", bias=True, softcap=3.0)
    assert run(device, target, capped, 1) < 1e-5
