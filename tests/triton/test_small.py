"""Triton's norm, rope and gated SiLU against the reference, and their gradients against fp64 autograd."""

from __future__ import annotations

import pytest
import torch

from edgeformer.kernels.norm.reference import norm as norm_reference
from edgeformer.kernels.norm.spec import NormSpec
from edgeformer.kernels.rope.reference import rope as rope_reference
from edgeformer.kernels.rope.spec import RopeSpec

from .conftest import assert_close

triton = pytest.importorskip("triton")
ROUNDING = 2**-11 + 1e-5


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dim", [33, 576])
@pytest.mark.parametrize("residual", [False, True])
def test_norm(kind: str, dim: int, residual: bool) -> None:
    from edgeformer.kernels.norm.triton_kernel import backward, forward

    spec = NormSpec(kind, dim, 1e-5, "float16", "float16", weight_offset=1.0, bias=kind == "layer")
    x = torch.randn(7, dim + 5).half()[:, :dim]
    weight, bias = torch.randn(dim).half(), torch.randn(dim).half() if spec.bias else None
    other = torch.randn(7, dim).half() if residual else None
    y, total = forward(spec, x, weight, bias, other)
    seen = x
    if other is not None:
        seen = x + other
        assert total is not None and torch.equal(total, seen)
    assert_close(y, norm_reference(spec, seen, weight, bias), ROUNDING)

    wide = [t.double().requires_grad_() for t in (seen, weight)]
    moved = wide[0] - wide[0].mean(1, keepdim=True) if kind == "layer" else wide[0]
    truth = moved / ((moved * moved).mean(1, keepdim=True) + 1e-5).sqrt() * (wide[1] + 1.0)
    dy = torch.randn(7, dim).half()
    truth.backward(dy.double())
    dx, dw, db = backward(spec, seen, weight, dy, spec.bias)
    assert wide[0].grad is not None and wide[1].grad is not None
    assert_close(dx, wide[0].grad, ROUNDING)
    assert_close(dw, wide[1].grad, ROUNDING)
    if spec.bias:
        assert_close(db, dy.double().sum(0), ROUNDING)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (80, 48)])
@pytest.mark.parametrize("batched", [False, True])
def test_rope(interleaved: bool, dim: int, rotary: int, batched: bool) -> None:
    from edgeformer.kernels.rope.triton_kernel import rotate

    spec = RopeSpec(dim, rotary, interleaved, "float16")
    x = torch.randn(2, 5, 3, dim).half().transpose(1, 2)
    angle = torch.randn(2, 5, rotary // 2) if batched else torch.randn(5, rotary // 2)
    got = rotate(spec, x, angle.cos(), angle.sin())
    assert_close(got, rope_reference(spec, x.float(), angle.cos(), angle.sin()), ROUNDING)
    back = rotate(spec, got, angle.cos(), angle.sin(), inverse=True)  # the gradient: an orthogonal map
    assert_close(back, x, 2 * ROUNDING)
    own = x.contiguous()
    assert rotate(spec, own, angle.cos(), angle.sin(), out=own) is own
    assert torch.equal(own, got)


@pytest.mark.parametrize("columns", [33, 1100])
def test_gated_silu(columns: int) -> None:
    from edgeformer.kernels.gated_silu.triton_kernel import backward, forward

    both = torch.randn(3, 2 * columns).half()
    gate, up = both.chunk(2, 1)
    wide = [t.double().requires_grad_() for t in (gate, up)]
    truth = torch.nn.functional.silu(wide[0]) * wide[1]
    assert_close(forward(gate, up), truth, ROUNDING)
    dy = torch.randn(3, columns).half()
    truth.backward(dy.double())
    for got, x in zip(backward(gate, up, dy), wide):
        assert x.grad is not None
        assert_close(got, x.grad, ROUNDING)
