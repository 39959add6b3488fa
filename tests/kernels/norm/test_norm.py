"""norm: every form against the reference, at odd sizes, on all types, with NaN and Inf."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from edgeformer.compiler.errors import EdgeFormerError, UnsupportedError
from edgeformer.compiler.target import Target, detect
from edgeformer.kernels.norm import OPERATOR, tvm_cpu
from edgeformer.kernels.norm.reference import norm, norm_quantized, quantize
from edgeformer.kernels.norm.spec import TOLERANCE, NormSpec, examples
from edgeformer.runtime import launch

ISAS = sorted({"portable", detect().isa})
ROWS = (1, 2, 3, 5, 17)
DTYPES = ("float32", "bfloat16", "float16")


def bound(spec: NormSpec, isa: str, configuration: dict | None = None):
    target = detect().with_isa(isa)
    return launch.bind(OPERATOR, tvm_cpu.FORM, spec, configuration or tvm_cpu.space(spec, target)[0], target)


def problem(spec: NormSpec, rows: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed + rows)
    x = (torch.randn(rows, spec.dim, generator=generator) * 3 + 0.5).to(getattr(torch, spec.dtype))
    weight = torch.randn(spec.dim, generator=generator).to(getattr(torch, spec.weight_dtype))
    bias = torch.randn(spec.dim, generator=generator).to(weight.dtype) if spec.bias else None
    return x, weight, bias


def assert_close(got: torch.Tensor, want: torch.Tensor, spec: NormSpec) -> None:
    error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)
    assert error <= TOLERANCE[spec.out_dtype], f"relative error {error:.2e}"


def assert_quantized(got, want, size: int) -> None:
    """Codes may differ by one where fp32 addition order moves a value across a rounding edge."""
    difference = (got[0].int() - want[0].int()).abs()
    assert difference.max() <= 1 and (difference > 0).sum() <= 1 + got[0].numel() // 500
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=0)
    groups = got[1].shape[-1]
    padded = torch.nn.functional.pad(got[0].int(), (0, groups * size - got[0].shape[-1]))
    assert torch.equal(padded.unflatten(-1, (groups, size)).sum(-1, dtype=torch.int32), got[2])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dim", [1, 45, 576])
def test_float_output(isa: str, kind: str, dim: int) -> None:
    spec = NormSpec(kind, dim, 1e-5, bias=kind == "layer", weight_offset=float(kind == "rms"))
    call = bound(spec, isa)
    for rows in ROWS:
        args = problem(spec, rows)
        if dim == 1 and kind == "layer":  # x - mean is zero: only the bias is left
            assert torch.equal(call(*args), norm(spec, *args))
        else:
            assert_close(call(*args), norm(spec, *args), spec)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dim", "dtype"), [(1, "float32"), (77, "bfloat16"), (605, "float32")])
def test_residual(isa: str, dim: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = NormSpec("rms", dim, 1e-6, dtype=dtype, weight_dtype="float32", residual=True)
    call, empty = bound(spec, isa), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype: empty(*shape, dtype=dtype).fill_(torch.nan))
    for rows in (*ROWS, 600):
        x, weight, _ = problem(spec, rows)
        residual = torch.randn(dim, rows).T.to(x.dtype)  # not contiguous
        assert_close(call(x, weight, None, residual), norm(spec, x, weight, None, residual), spec)
    x, weight, _ = problem(spec, 2)
    with pytest.raises(EdgeFormerError, match="residual"):
        call(x, weight)
    with pytest.raises(UnsupportedError, match="no residual"):
        NormSpec("rms", dim, 1e-6, residual=True, group_size=32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"), [*zip(DTYPES, DTYPES, strict=True), ("bfloat16", "float32")]
)
def test_types(isa: str, dtype: str, weight_dtype: str) -> None:
    spec = NormSpec("rms", 77, 1e-6, dtype=dtype, weight_dtype=weight_dtype)
    args = problem(spec, 3)
    got = bound(spec, isa)(*args)
    assert got.dtype == getattr(torch, dtype)
    assert_close(got, norm(spec, *args), spec)


@pytest.mark.parametrize("isa", [*ISAS, "portable16"])
@pytest.mark.parametrize(("dim", "group"), [(100, 32), (7, 32), (576, 128), (650, 64), (333, 256)])
def test_quantized_output(isa: str, dim: int, group: int) -> None:
    spec = NormSpec("layer" if dim == 650 else "rms", dim, 1e-5, bias=dim == 650, group_size=group)
    call = bound(spec, isa)
    for rows in ROWS:
        args = problem(spec, rows)
        assert_quantized(call(*args), norm_quantized(spec, *args), group)


@pytest.mark.parametrize("accumulators", [1, 2, 8])
def test_every_configuration(accumulators: int) -> None:
    spec = NormSpec("rms", 200, 1e-5)
    args = problem(spec, 5)
    assert_close(bound(spec, detect().isa, {"accumulators": accumulators})(*args), norm(spec, *args), spec)


@pytest.mark.parametrize("isa", ISAS)
def test_nan_and_inf_are_not_hidden(isa: str) -> None:
    spec = NormSpec("rms", 70, 1e-5)
    x, weight, _ = problem(spec, 4)
    x[1, 3], x[2, 69], x[3] = torch.nan, torch.inf, 0.0
    got, want = bound(spec, isa)(x, weight), norm(spec, x, weight)
    assert torch.equal(got.isnan(), want.isnan()) and got[1].isnan().all() and got[2, 69].isnan()
    assert torch.equal(got[3], want[3])
    quantized = dataclasses.replace(spec, group_size=32)
    codes, scale, sums = bound(quantized, isa)(x, weight)
    want_codes, want_scale, want_sums = norm_quantized(quantized, x, weight)
    assert torch.equal(codes[1:], want_codes[1:]) and torch.equal(sums[1:], want_sums[1:])
    assert torch.equal(scale[1:].isnan(), want_scale[1:].isnan()) and scale[1].isnan().all()
    assert scale[3].eq(0).all()


def test_strided_rows_and_in_place_shapes() -> None:
    spec = NormSpec("rms", 48, 1e-5)
    call = bound(spec, detect().isa)
    wide, weight, _ = torch.randn(6, 200), torch.randn(48), None
    view = wide[:, 3:51]  # rows 200 apart, and not on a 64-byte line
    assert_close(call(view, weight), norm(spec, view, weight), spec)
    cube = torch.randn(2, 3, 48)
    assert call(cube, weight).shape == cube.shape
    assert_close(call(cube, weight), norm(spec, cube, weight), spec)
    assert call(torch.empty(0, 48), weight).shape == (0, 48)
    every_other = torch.randn(96)[::2]
    assert_close(call(cube, every_other), norm(spec, cube, every_other), spec)
    with pytest.raises(EdgeFormerError, match="bound for"):
        call(cube, weight[:40])


def test_many_rows_in_parallel_and_every_output_written(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = NormSpec("rms", 65, 1e-5, group_size=32)
    call = bound(spec, detect().isa)
    empty = torch.empty

    def poisoned(*shape, dtype=torch.float32):
        out = empty(*shape, dtype=dtype)
        return out.fill_(torch.nan if dtype.is_floating_point else -128)

    monkeypatch.setattr(torch, "empty", poisoned)
    args = problem(spec, 513)
    got = call(*args)
    assert not (got[0] == -128).any() and not got[1].isnan().any()
    want = norm_quantized(spec, *args)
    assert (got[0].int() - want[0].int()).abs().max() <= 1


def test_reference_against_torch() -> None:
    x, weight, bias = torch.randn(4, 96), torch.randn(96), torch.randn(96)
    layer = NormSpec("layer", 96, 1e-5, bias=True)
    torch.testing.assert_close(
        norm(layer, x, weight, bias), torch.nn.functional.layer_norm(x, (96,), weight, bias, 1e-5)
    )
    rms = NormSpec("rms", 96, 1e-5)
    torch.testing.assert_close(norm(rms, x, weight), torch.nn.functional.rms_norm(x, (96,), weight, 1e-5))


def test_quantizer_by_hand() -> None:
    codes, scale, sums = quantize(torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0]]), 4)
    assert codes.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0]]  # halves go to even
    assert scale.tolist() == [[1.0], [0.0]] and sums.tolist() == [[127], [0]]


@pytest.mark.parametrize("bad", [{"kind": "batch"}, {"dim": 0}, {"dtype": "int8"}, {"group_size": -1}])
def test_bad_specs_are_refused(bad: dict) -> None:
    with pytest.raises(UnsupportedError):
        NormSpec(**{"kind": "rms", "dim": 8, "eps": 1e-5, **bad})


def test_compiles_for_avx512() -> None:
    from edgeformer.compiler.backends import tvm_llvm

    target = Target.parse("znver5")
    for spec in examples():
        inspection = tvm_llvm.inspect(tvm_cpu.lower(spec, tvm_cpu.space(spec, target)[0], target), target)
        assert "%zmm" in inspection.assembly
