"""Random attention problems, and the comparison of a form with the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from edgeformer.compiler.target import Target, detect
from edgeformer.kernels.attention import OPERATOR, TVM_CPU, AttentionSpec
from edgeformer.kernels.attention.append import quantize
from edgeformer.kernels.attention.reference import attention as reference
from edgeformer.runtime import launch

NAN = float("nan")


@dataclass
class Problem:
    """Inputs of one call: q, k, v in the spec's types and layout, and the options."""

    spec: AttentionSpec
    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, call: Callable[..., Any], **more: Any) -> tuple[Tensor, Tensor | None]:
        """Call a bound form on a NaN-filled output."""
        batch, heads, tq, _ = self.q.shape
        out = torch.full((batch, tq, heads, self.spec.v_head_dim), NAN, dtype=self.q.dtype).transpose(1, 2)
        return call(self.q, self.k, self.v, out=out, **self.options, **more)

    def expected(self) -> tuple[Tensor, Tensor]:
        """Return the reference's fp64 result."""
        return reference(self.spec, self.q, self.k, self.v, **self.options)


def make_problem(spec: AttentionSpec, batch: int, tq: int, tk: int, seed: int = 0) -> Problem:
    """Return a random problem. Strided k and v are views of [B, T, H, D]; unused cache slots hold NaN."""
    torch.manual_seed(1000 * tk + 10 * tq + batch + seed)
    kind = getattr(torch, spec.kv_dtype)
    options: dict[str, Any] = {"tk": tk}
    tensors = []
    for name, dim in (("k", spec.head_dim), ("v", spec.v_head_dim)):
        x = torch.randn(batch, tk, spec.num_kv_heads, dim).transpose(1, 2)
        if spec.kv_dtype == "int8":
            x, options[f"{name}_scale"] = quantize(x)
        tensors.append(x.to(kind))
    if spec.layout == "blocked":
        tensors = list(blocked(spec, tensors[0], tensors[1], options))
    q = torch.randn(batch, tq, spec.num_heads, spec.head_dim).transpose(1, 2).to(getattr(torch, spec.q_dtype))
    if spec.mask == "causal_lengths":
        options["lengths"] = torch.randint(0, tk + 1, (batch,), dtype=torch.int32)
        options["lengths"][0] = tk
    if spec.mask == "prefix":
        options["prefix"] = torch.randint(0, tk + 1, (batch,), dtype=torch.int32)
    if spec.mask == "additive":
        bias = torch.randn(batch, 1, tq, tk)
        bias[torch.rand(bias.shape) < 0.2] = -torch.inf
        bias[0, 0, 0] = -torch.inf  # a row that sees nothing
        options["bias"] = bias.to(getattr(torch, spec.bias_dtype))
    if spec.sinks:
        options["sinks"] = torch.randn(spec.num_heads)
    if spec.window:
        options["window"] = 1 + (tk * 3 + tq) % 37  # smaller and larger than the length
    if spec.softcap:
        options["softcap"] = 3.0
    return Problem(spec, q, tensors[0], tensors[1], options)


def blocked(spec: AttentionSpec, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return k and v in the blocked layout, with a spare block; scales in `options` grow along."""
    batch, heads, tk, dim = k.shape
    slots = -(-tk // 16) * 16 + 16
    empty = 0 if spec.kv_dtype == "int8" else NAN
    wide_k = torch.full((batch, heads, slots, dim), empty, dtype=k.dtype)
    wide_v = torch.full((batch, heads, slots, spec.v_head_dim), empty, dtype=v.dtype)
    wide_k[:, :, :tk], wide_v[:, :, :tk] = k, v
    for name in ("k_scale", "v_scale"):
        if name in options:
            scale = torch.full((batch, heads, slots), NAN)
            scale[:, :, :tk] = options[name]
            options[name] = scale
    return wide_k.view(batch, heads, slots // 16, 16, dim).transpose(3, 4).contiguous(), wide_v


def bound(spec: AttentionSpec, isa: str = "", changes: dict[str, Any] | None = None) -> Callable[..., Any]:
    """Return the compiled form's callable for this host (or another composition of it)."""
    target = detect().with_isa(isa) if isa else detect()
    return launch.bind(OPERATOR, TVM_CPU, spec, {**TVM_CPU.space(spec, target)[0], **(changes or {})}, target)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative L2 error within `tolerance`; NaN and Inf at the same places."""
    a, e = actual.double(), expected.double()
    assert torch.equal(a.isnan(), e.isnan()), f"NaN at {(a.isnan() != e.isnan()).sum().item()} wrong places"
    infinite = e.isinf()
    assert torch.equal(a[infinite], e[infinite])
    a, e = a[e.isfinite()], e[e.isfinite()]
    error = (a - e).norm() / e.norm().clamp_min(1e-30) if e.numel() else torch.zeros(())
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def check(problem: Problem, call: Callable[..., Any]) -> None:
    """Compare a bound form with the reference. The kernels' 2**x for bf16 math is good to 8e-5."""
    out, lse = problem.run(call)
    expected, expected_lse = problem.expected()
    assert_close(out, expected, problem.spec.tolerance)
    if problem.spec.lse:
        assert lse is not None
        assert_close(lse, expected_lse, 1e-5 if problem.spec.math == "float32" else 2e-4)


@pytest.fixture
def avx512() -> Target:
    """A target whose code is inspected, not run."""
    return Target.parse("znver5")
