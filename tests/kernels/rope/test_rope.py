"""rope: every form against the reference: orders, partial rotation, types, strides, in place."""

from __future__ import annotations

import pytest
import torch

from edgeformer.compiler.errors import EdgeFormerError, UnsupportedError
from edgeformer.compiler.target import Target, detect
from edgeformer.kernels.rope import OPERATOR, tvm_cpu
from edgeformer.kernels.rope.reference import rope
from edgeformer.kernels.rope.spec import TOLERANCE, RopeSpec, examples
from edgeformer.runtime import launch

ISAS = sorted({"portable", detect().isa})


def bound(spec: RopeSpec, isa: str):
    return launch.bind(OPERATOR, tvm_cpu.FORM, spec, {}, detect().with_isa(isa))


def tables(positions: int, rotary_dim: int, batch: int = 0):
    angles = torch.rand(*([batch] if batch else []), positions, rotary_dim // 2) * 100
    return angles.cos(), angles.sin()


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: str) -> None:
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error <= TOLERANCE[dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("isa", [*ISAS, "portable16"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 0), (80, 32), (38, 26), (7, 6)])
def test_orders_and_partial(isa: str, interleaved: bool, head_dim: int, rotary_dim: int) -> None:
    spec = RopeSpec(head_dim, rotary_dim, interleaved)
    call = bound(spec, isa)
    for batch, heads, positions in ((1, 1, 1), (1, 3, 2), (2, 5, 17)):
        x = torch.randn(batch, heads, positions, head_dim)
        cos, sin = tables(positions, spec.rotary_dim)
        out = torch.full_like(x, torch.nan)
        assert call(x, cos, sin, out) is out
        assert_close(out, rope(spec, x, cos, sin), "float32")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_types(isa: str, dtype: str, interleaved: bool) -> None:
    spec = RopeSpec(70, 46, interleaved, dtype)
    x = torch.randn(2, 3, 5, 70).to(getattr(torch, dtype))
    cos, sin = tables(5, 46)
    assert_close(bound(spec, isa)(x, cos, sin), rope(spec, x, cos, sin), dtype)


def test_strided_in_place_and_tables_per_batch() -> None:
    spec = RopeSpec(64)
    call = bound(spec, detect().isa)
    fused = torch.randn(2, 9, 5 * 64 + 3)  # rows of a fused projection, off the 64-byte lines
    x = fused[..., 1 : 1 + 3 * 64].unflatten(-1, (3, 64)).transpose(1, 2)
    cos, sin = tables(9, 64, batch=2)
    want, others = rope(spec, x, cos, sin), fused[..., 1 + 3 * 64 :].clone()
    assert call(x, cos, sin, x) is x
    assert_close(x, want, "float32")
    assert torch.equal(fused[..., 1 + 3 * 64 :], others)


def test_parallel_nan_and_copies() -> None:
    spec = RopeSpec(64, 32)
    call = bound(spec, detect().isa)
    x = torch.randn(1, 9, 513, 64)
    x[0, 2, 7, 1], x[0, 2, 7, 40] = torch.nan, torch.inf
    cos, sin = tables(513, 32)
    got, want = call(x, cos, sin), rope(spec, x, cos, sin)
    assert torch.equal(got.isnan(), want.isnan()) and got[0, 2, 7, 40].isinf()
    assert_close(got.nan_to_num(0, 0), want.nan_to_num(0, 0), "float32")
    swapped = torch.randn(1, 2, 64, 3).transpose(2, 3)  # last stride is not 1
    cos, sin = tables(3, 32)
    assert_close(call(swapped, cos, sin), rope(spec, swapped, cos, sin), "float32")
    with pytest.raises(EdgeFormerError):
        call(swapped, cos, sin, swapped)
    with pytest.raises(EdgeFormerError, match="tables have to be"):
        call(torch.empty(1, 2, 4, 64), cos, sin)
    assert call(torch.empty(1, 2, 0, 64), cos[:0], sin[:0]).shape == (1, 2, 0, 64)


def test_reference_against_complex_numbers() -> None:
    spec = RopeSpec(8, interleaved=True)
    x, angles = torch.randn(1, 1, 3, 8), torch.rand(3, 4)
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones(3, 4), angles)
    want = torch.view_as_real(turned).flatten(-2)
    torch.testing.assert_close(rope(spec, x, angles.cos(), angles.sin()), want)
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # the half-split order of the same pairs
    half = rope(RopeSpec(8), x[..., order], angles.cos(), angles.sin())
    torch.testing.assert_close(half, want[..., order])


@pytest.mark.parametrize("bad", [{"rotary_dim": 3}, {"rotary_dim": 66}, {"dtype": "int8"}])
def test_bad_specs_are_refused(bad: dict) -> None:
    with pytest.raises(UnsupportedError):
        RopeSpec(**{"head_dim": 64, **bad})


def test_compiles_for_avx512() -> None:
    from edgeformer.compiler.backends import tvm_llvm

    target = Target.parse("znver5")
    for spec in examples():
        assert "%zmm" in tvm_llvm.inspect(tvm_cpu.lower(spec, {}, target), target).assembly
