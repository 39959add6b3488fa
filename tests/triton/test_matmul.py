"""Triton's quantised matmul and sparse MLP against the reference, at odd sizes; gradients for x."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgeformer.compiler.errors import UnsupportedError
from edgeformer.kernels.quant_matmul import CanonicalWeight, QuantMatmulSpec, WeightFormat
from edgeformer.kernels.quant_matmul.reference import quant_matmul as reference
from edgeformer.kernels.quant_matmul.reference import quantize_activations
from edgeformer.kernels.quant_matmul.triton_packing import pack_gpu, unpack_gpu
from edgeformer.kernels.sparse_mlp import SparseMlpSpec
from edgeformer.kernels.sparse_mlp.reference import active
from edgeformer.kernels.sparse_mlp.reference import sparse_mlp as sparse_reference

from .conftest import assert_close, nan_like

triton = pytest.importorskip("triton")
FORMATS = {
    "w4g32": WeightFormat.int4(),
    "w4g128": WeightFormat.int4(128),
    "w4g64-integer": WeightFormat.int4(64, "integer"),
    "w4g32-minimum": WeightFormat.int4(32, "minimum"),
    "w2g64": WeightFormat("int", 2, 64, "float16", "constant"),
    "w8g32": WeightFormat.int8(32),
    "w8g128": WeightFormat.int8(128),
}
VECTOR: dict[str, Any] = {"vector": True, "BLOCK_N": 16}
MATRIX: dict[str, Any] = {"vector": False, "BLOCK_M": 16, "BLOCK_N": 16}


@pytest.mark.parametrize("name", FORMATS)
def test_packing_is_exact(name: str) -> None:
    for n, k in ((5, 130), (7, 1024)):
        weight = CanonicalWeight.from_float(torch.randn(n, k), FORMATS[name])
        packed = pack_gpu(weight)
        again = unpack_gpu(packed)
        assert torch.equal(again.codes, weight.codes)
        assert again.scale is not None and weight.scale is not None and torch.equal(again.scale, weight.scale)
        assert (again.zero is None) == (weight.zero is None)
        if weight.zero is not None and again.zero is not None:
            assert torch.equal(again.zero, weight.zero)
        assert packed.words.stride(0) * packed.words.element_size() % 1024 != 0


def test_float_weights_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="float16"):
        pack_gpu(CanonicalWeight.from_float(torch.randn(4, 32), WeightFormat.float("float16")))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("m", "splits"), [(1, 1), (3, 2), (5, 1), (19, 2)])
def test_weight_only(name: str, m: int, splits: int) -> None:
    from edgeformer.kernels.quant_matmul.triton_matmul import launch

    n, k = 37, 290
    weight = CanonicalWeight.from_float(torch.randn(n, k) / 16, FORMATS[name])
    x, bias, residual = torch.randn(m, k).half(), torch.randn(n), torch.randn(m, n).half()
    y = nan_like((m, n))
    launch(x, pack_gpu(weight), bias, residual, y, VECTOR if m <= 4 else MATRIX, splits)
    spec = QuantMatmulSpec(n, k, weight.format, "float", "float16", bias=True, residual=True)
    assert_close(y, reference(spec, x.float(), weight, bias, residual.float()), 1e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_gradient_of_x(name: str) -> None:
    from edgeformer.kernels.quant_matmul.triton_matmul import grad_x

    weight = CanonicalWeight.from_float(torch.randn(37, 290) / 16, FORMATS[name])
    x = torch.randn(19, 290, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(19, 37).half()
    (x @ weight.dequantize().double().T).backward(dy.double())
    assert x.grad is not None
    got = grad_x(dy, pack_gpu(weight), {"BLOCK_M": 16, "BLOCK_N": 16})
    assert_close(got, x.grad, 1e-3)


@pytest.mark.parametrize("group", [32, 128])
def test_int8_activations(group: int) -> None:
    from edgeformer.kernels.quant_matmul.triton_w8a8 import launch, quantise

    m, n, k = 19, 37, 290
    weight = CanonicalWeight.from_float(torch.randn(n, k) / 16, WeightFormat.int8(group))
    x, bias = torch.randn(m, k).half(), torch.randn(n)
    y = nan_like((m, n))
    launch(x, pack_gpu(weight), bias, None, y, {"BLOCK_M": 16, "BLOCK_N": 16})
    spec = QuantMatmulSpec(n, k, weight.format, "int8", "float16", bias=True)
    assert_close(y, reference(spec, x.float(), weight, bias), 2**-11 + 1e-5)
    x[0, 0], x[1] = torch.inf, 0.0
    groups = -(-k // group)
    codes, scales = torch.empty(m, groups * group, dtype=torch.int8), torch.empty(m, groups)
    quantise(x, codes, scales, group)
    want, want_scales = quantize_activations(x, group)
    assert torch.equal(codes[1:], want.view(m, -1)[1:])
    assert torch.allclose(scales, want_scales, equal_nan=True, rtol=1e-6, atol=0)


@pytest.mark.parametrize("down", ["w4g32", "w4g128", "w4g64-integer", "w4g32-minimum"])
@pytest.mark.parametrize("m", [1, 3])
def test_sparse_mlp(down: str, m: int) -> None:
    from edgeformer.kernels.sparse_mlp.triton_kernel import launch, pack_sparse

    spec = SparseMlpSpec(
        140, 256, FORMATS["w4g32"], FORMATS[down], "silu", arithmetic="float", x_dtype="float16"
    )
    both = torch.randn(512, 140) / 12
    both[:256].view(spec.blocks, -1)[1::2] *= 0.02
    gate_up = CanonicalWeight.from_float(both, spec.gate_up)
    last = CanonicalWeight.from_float(torch.randn(140, 256) / 16, spec.down)
    packed = pack_sparse(gate_up.slice_rows(0, 256), gate_up.slice_rows(256, 512), last)
    x = torch.randn(m, 140).half()
    seen = active(spec, x.float(), gate_up, threshold=0.1)
    assert 0 < seen.sum() < seen.numel()
    want = sparse_reference(spec, x.float(), gate_up, last, threshold=0.1)
    for fires in (None, seen.int()):
        y = nan_like((m, 140))
        launch(
            x,
            packed,
            y,
            threshold=0.1,
            fires=fires,
            block=spec.block,
            activation="silu",
            splits=2,
            configuration={},
        )
        assert_close(y, want, 1e-3)
