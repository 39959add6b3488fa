"""The operators on GPU tensors, run by the interpreter: shapes, gradients through autograd, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgeformer.compiler.errors import UnsupportedError
from edgeformer.kernels.attention import AttentionSpec
from edgeformer.kernels.attention.reference import attention as reference
from edgeformer.kernels.mla import MlaSpec
from edgeformer.kernels.mla.reference import mla as mla_reference
from edgeformer.kernels.norm.spec import NormSpec
from edgeformer.kernels.quant_matmul import CanonicalWeight, WeightFormat
from edgeformer.kernels.quant_matmul.triton_packing import pack_gpu
from edgeformer.kernels.rope.spec import RopeSpec
from edgeformer.kernels.shared import gpu_defaults
from edgeformer.runtime import gpu, gpu_tiles

from .conftest import assert_close


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's time grows with the tile, not with the problem."""
    table = {
        kernel: {
            f: {n: min(v, 16) if n.startswith("BLOCK") else v for n, v in t.items()} for f, t in tiles.items()
        }
        for kernel, tiles in gpu_defaults._TABLE.items()
    }
    monkeypatch.setattr(gpu_defaults, "_TABLE", table)
    gpu_tiles.forget()


@pytest.mark.parametrize("tq", [2, 21])
def test_attention(tq: int) -> None:
    q, k, v = (
        torch.randn(1, 4, tq, 64).half(),
        torch.randn(1, 2, 40, 64).half(),
        torch.randn(1, 2, 40, 64).half(),
    )
    out, lse = gpu.attention(q, k, v, mask="causal")
    want, want_lse = reference(AttentionSpec(4, 2, 64, 64), q, k, v)
    assert_close(out, want, 2e-3)
    assert_close(lse, want_lse, 1e-3)


def test_gradients_flow() -> None:
    leaves = [torch.randn(1, h, 19, 64).half().requires_grad_() for h in (4, 2, 2)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    grad = torch.randn(1, 4, 19, 64).half()
    gpu.attention(leaves[0], leaves[1], leaves[2], mask="causal")[0].backward(grad)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    sdpa(wide[0], wide[1], wide[2], is_causal=True, enable_gqa=True).backward(grad.double())
    for got, want in zip(leaves, wide):
        assert got.grad is not None and want.grad is not None
        assert_close(got.grad, want.grad, 3e-3)


def test_a_block_of_operators() -> None:
    """norm -> matmul -> rope -> gated silu, forward and backward, against the same in fp64."""
    weight = CanonicalWeight.from_float(torch.randn(64, 96) / 10, WeightFormat.int4())
    packed, dense = pack_gpu(weight), weight.dequantize().double()
    x, scale = torch.randn(3, 96).half().requires_grad_(), torch.randn(96).half()
    angle = torch.randn(3, 16)
    spec = NormSpec("rms", 96, 1e-5, "float16", "float16")

    def ours(x: torch.Tensor) -> torch.Tensor:
        y = gpu.quant_matmul(gpu.norm(spec, x, scale, None), packed)
        heads = y.view(1, 3, 2, 32).transpose(1, 2)
        turned = gpu.rope(RopeSpec(32, dtype="float16"), heads, angle.cos(), angle.sin())
        return gpu.gated_silu(turned[:, 0], turned[:, 1])

    def truth(x: torch.Tensor) -> torch.Tensor:
        y = (x * (x.square().mean(1, keepdim=True) + 1e-5).rsqrt() * scale.double()) @ dense.T
        a, b = y.view(1, 3, 2, 32).transpose(1, 2).chunk(2, 3)
        cos, sin = angle.cos().double(), angle.sin().double()
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], 3)
        return torch.nn.functional.silu(turned[:, 0]) * turned[:, 1]

    wide = x.detach().double().requires_grad_()
    out, want = ours(x), truth(wide)
    assert_close(out, want, 3e-3)
    grad = torch.randn(out.shape).half()
    out.backward(grad)
    want.backward(grad.double())
    assert x.grad is not None and wide.grad is not None
    assert_close(x.grad, wide.grad, 5e-3)


def test_mla() -> None:
    spec = MlaSpec(4, 64, 32, 16, 32, "float16", "float16", "float16", lse=True)
    q_nope, q_rope, cache = (
        torch.randn(1, 4, 1, 32).half(),
        torch.randn(1, 4, 1, 16).half(),
        torch.randn(1, 45, 80).half(),
    )
    w_uk, w_uv = (torch.randn(4, 32, 64) / 8).half(), (torch.randn(4, 64, 32) / 8).half()
    want, want_lse = mla_reference(spec, q_nope, q_rope, cache, w_uk, w_uv, tk=40)
    for mode in ("absorbed", "expanded"):
        out, lse = gpu.mla(q_nope, q_rope, cache, w_uk, w_uv, tk=40, mask="causal", mode=mode)
        assert_close(out, want, 5e-3)
        assert_close(lse, want_lse, 5e-3)


def test_mla_with_lengths_on_the_device() -> None:
    spec = MlaSpec(4, 64, 32, 16, 32, "float16", "float16", "float16", lse=True)
    q_nope, q_rope, cache = (
        torch.randn(2, 4, 1, 32).half(),
        torch.randn(2, 4, 1, 16).half(),
        torch.randn(2, 45, 80).half(),
    )
    w_uk, w_uv = (torch.randn(4, 32, 64) / 8).half(), (torch.randn(4, 64, 32) / 8).half()
    lengths = torch.tensor([40, 3], dtype=torch.int32)
    out, _ = gpu.mla(
        q_nope, q_rope, cache, w_uk, w_uv, tk=45, mask="causal", mode="absorbed", lengths=lengths
    )
    for b, tk in enumerate(lengths.tolist()):
        row = slice(b, b + 1)
        want, _ = mla_reference(spec, q_nope[row], q_rope[row], cache[row], w_uk, w_uv, tk=tk)
        assert_close(out[row], want, 5e-3)
    with pytest.raises(UnsupportedError, match="absorbed"):
        gpu.mla(q_nope, q_rope, cache, w_uk, w_uv, tk=45, mask="causal", mode="expanded", lengths=lengths)


def test_what_the_kernels_do_not_take_is_refused() -> None:
    q, k = torch.randn(1, 2, 20, 64).half(), torch.randn(1, 2, 20, 64).half()
    cases: list[tuple[tuple[torch.Tensor, ...], dict[str, Any], str]] = [
        ((q.float(), k, k), {}, "float32"),
        ((q.transpose(2, 3), k, k), {}, "last stride"),
        ((q, k, k), {"mask": "additive"}, "additive"),
        ((q, k, k), {"sinks": torch.ones(2)}, "sinks"),
        ((q[..., :8], k[..., :8], k), {}, "head sizes"),
        ((q, k[:, :, :10], k), {}, "do not fit"),
    ]
    for tensors, options, word in cases:
        with pytest.raises(UnsupportedError, match=word):
            gpu.attention(*tensors, **options)  # pyright: ignore
    packed = pack_gpu(CanonicalWeight.from_float(torch.randn(8, 64), WeightFormat.int4()))
    with pytest.raises(UnsupportedError, match="int8"):
        gpu.quant_matmul(torch.randn(2, 64).half(), packed, activation="int8")
    with pytest.raises(UnsupportedError, match="device meta"):
        gpu.require_gpu(torch.empty(1, device="meta"))


def test_defaults_cover_every_kernel_and_family() -> None:
    families = {"cdna", "rdna3", "rdna4", "ampere", "hopper"}
    assert all(set(tiles) == families for tiles in gpu_defaults._TABLE.values())
