"""Triton attention against the reference: prefill, its gradients against fp64 autograd, decode, latents."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from edgeformer.kernels.attention import AttentionSpec
from edgeformer.kernels.attention.append import quantize
from edgeformer.kernels.attention.reference import attention as reference
from edgeformer.kernels.mla import MlaSpec
from edgeformer.kernels.mla.reference import mla as mla_reference

from .conftest import assert_close, nan_like

triton = pytest.importorskip("triton")
HALF = 1e-3  # fp16 weights and values, fp32 sums
TILE = {"BLOCK_M": 16, "BLOCK_N": 16}

# heads, kv heads, D, Dv, Tq, Tk, causal, window, softcap, left padding
PREFILL = [
    (4, 2, 64, 64, 37, 37, True, 0, 0.0, False),
    (2, 2, 80, 48, 19, 50, False, 0, 0.0, False),
    (3, 1, 128, 128, 33, 65, True, 21, 0.0, True),
    (2, 1, 256, 64, 17, 40, True, 0, 3.0, False),
    (2, 2, 96, 96, 50, 50, False, 9, 2.0, False),
    (2, 2, 64, 64, 20, 7, True, 0, 0.0, False),  # rows that see nothing
]


def inputs(
    case: tuple[Any, ...], batch: int = 2
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any], AttentionSpec]:
    heads, kv, d, dv, tq, tk, causal, window, softcap, padded = case
    q = torch.randn(batch, tq, heads, d).half().transpose(1, 2)
    k, v = (torch.randn(batch, tk, kv, size).half().transpose(1, 2) for size in (d, dv))
    lengths = torch.tensor([tk, max(1, tk - 11)], dtype=torch.int32)[:batch] if padded else None
    mask = ("causal_lengths" if padded else "causal") if causal else "none"
    spec = AttentionSpec(
        heads, kv, d, dv, "float16", "float16", mask, window=window > 0, softcap=softcap > 0, lse=True
    )
    options = {"causal": causal, "window": window, "softcap": softcap, "scale": d**-0.5, "q_offset": tk - tq}
    return q, k, v, {**options, "lengths": lengths}, spec


def expected(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    kept = {n: options[n] for n in ("window", "softcap", "scale", "q_offset", "lengths")}
    return reference(spec, q, k, v, **kept)


@pytest.mark.parametrize("case", PREFILL, ids=str)
def test_prefill(case: tuple[Any, ...]) -> None:
    from edgeformer.kernels.attention.triton_prefill import forward

    q, k, v, options, spec = inputs(case)
    out = nan_like((2, q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)
    lse = forward(q, k, v, out=out, configuration=TILE, **options)
    want, want_lse = expected(spec, q, k, v, options)
    assert_close(out, want, HALF)
    assert_close(lse, want_lse, 1e-3)


def dense(q: Tensor, k: Tensor, v: Tensor, case: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """The reference again, in operations that autograd differentiates."""
    heads, kv, _, _, tq, tk, causal, window, softcap, _ = case
    k, v = (x.repeat_interleave(heads // kv, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * options["scale"]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    p = torch.arange(tq).view(-1, 1) + options["q_offset"]
    j = torch.arange(tk).view(1, -1)
    seen = torch.ones(tq, tk, dtype=torch.bool) if not causal else j <= p
    if window:
        seen = seen & ((p - j).abs() < window)
    seen = seen.expand(2, 1, tq, tk)
    if options["lengths"] is not None:
        seen = seen & (j >= tk - options["lengths"].view(-1, 1, 1, 1))
    weights = scores.masked_fill(~seen, -1e300).softmax(3).masked_fill(~seen, 0.0)
    return weights @ v


@pytest.mark.parametrize("case", PREFILL, ids=str)
def test_gradients(case: tuple[Any, ...]) -> None:
    from edgeformer.kernels.attention.triton_backward import backward
    from edgeformer.kernels.attention.triton_prefill import forward

    q, k, v, options, _ = inputs(case)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    truth = dense(wide[0], wide[1], wide[2], case, options)
    grad = torch.randn(truth.shape).half()
    truth.backward(grad.double())
    out = nan_like((2, q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)
    lse = forward(q, k, v, out=out, configuration=TILE, **options)
    tiles = {"q": TILE, "kv": TILE}
    for got, x in zip(backward(q, k, v, out, lse, grad, configurations=tiles, **options), wide):
        assert x.grad is not None
        assert_close(got, x.grad, 3 * HALF)


# heads, kv heads, D, Dv, Tq, page, int8, window, softcap
DECODE = [
    (8, 2, 64, 64, 1, 0, False, 0, 0.0),
    (6, 2, 80, 48, 3, 0, True, 0, 0.0),
    (4, 4, 128, 128, 1, 16, False, 0, 2.0),
    (4, 1, 64, 64, 2, 8, True, 20, 0.0),
]


@pytest.mark.parametrize("case", DECODE, ids=str)
@pytest.mark.parametrize("splits", [1, 3])
def test_decode(case: tuple[Any, ...], splits: int) -> None:
    from edgeformer.kernels.attention.triton_decode import decode

    heads, kv, d, dv, tq, page, int8, window, softcap = case
    lengths = torch.tensor([71, 5], dtype=torch.int32)
    q = torch.randn(2, heads, tq, d).half()
    k, v = torch.randn(2, kv, 80, d), torch.randn(2, kv, 80, dv)
    scales: dict[str, Any] = {}
    stored = {}
    for name, x in (("k", k), ("v", v)):
        if int8:
            codes, scales[f"{name}_scale"] = quantize(x)
            stored[name] = codes.to(torch.int8)
        else:
            stored[name] = x.half()
    pages = None
    call = {**stored, **scales}
    if page:
        pages = torch.randperm(2 * 80 // page).int().view(2, -1)
        for name, x in call.items():
            cut = x.unflatten(2, (80 // page, page)).transpose(1, 2).flatten(0, 1)
            call[name] = torch.empty_like(cut)
            call[name][pages.flatten().long()] = cut
    out = nan_like((2, heads, tq, dv))
    lse = decode(
        q, call["k"], call["v"], lengths=lengths, scale=d**-0.5, softcap=softcap, window=window, pages=pages,
        k_scale=call.get("k_scale"), v_scale=call.get("v_scale"), splits=splits, out=out,
            configuration={"BLOCK_N": 16},
    )  # fmt: skip
    kind = "int8" if int8 else "float16"
    spec = AttentionSpec(heads, kv, d, dv, "float16", kind, window=window > 0, softcap=softcap > 0)
    for b, tk in enumerate(lengths.tolist()):
        part = {n: x[b : b + 1] for n, x in scales.items()}
        want, want_lse = reference(
            spec,
            q[b : b + 1],
            stored["k"][b : b + 1],
            stored["v"][b : b + 1],
            tk=tk,
            window=window,
            softcap=softcap,
            **part,
        )
        assert_close(out[b : b + 1], want, 2 * HALF)
        assert_close(lse[b : b + 1], want_lse, 1e-3)


@pytest.mark.parametrize(("passes", "tq"), [(1, 1), (2, 1), (2, 3), (1, 2)])
def test_mla_decode(passes: int, tq: int) -> None:
    from edgeformer.kernels.mla.triton_decode import decode

    spec = MlaSpec(20, 64, 32, 16, 32, "float16", "float16", "float32", lse=True)
    lengths = torch.tensor([45, 9], dtype=torch.int32)
    q = torch.randn(2, 20, tq, 32 + 16).half()
    cache = torch.randn(2, 50, 80).half()
    cache[0, 45:], cache[1, 9:] = torch.nan, torch.nan
    w_uk, w_uv = torch.randn(20, 32, 64) / 8, torch.randn(20, 64, 32) / 8
    absorbed = torch.cat([torch.einsum("bhtd,hdr->bhtr", q[..., :32].float(), w_uk).half(), q[..., 32:]], 3)
    out = nan_like((2, 20, tq, 64), torch.float32)
    tile = {"BLOCK_M": 16, "BLOCK_N": 16, "passes": passes} | ({"BLOCK_R": 32} if passes == 2 else {})
    lse = decode(absorbed, cache, 64, lengths=lengths, scale=48**-0.5, splits=2, out=out, configuration=tile)
    got = torch.einsum("bhtr,hrd->bhtd", out, w_uv)
    for b, tk in enumerate(lengths.tolist()):
        some = slice(b, b + 1)
        want, want_lse = mla_reference(
            spec, q[some, :, :, :32], q[some, :, :, 32:], cache[some], w_uk, w_uv, tk=tk
        )
        assert_close(got[some], want, 2 * HALF)
        assert_close(lse[some], want_lse, 2e-3)


def test_splits_grow_with_the_context_and_shrink_with_the_batch() -> None:
    from edgeformer.kernels.attention.triton_decode import splits_for

    assert splits_for(8, 32768, 132, 64) == 64
    assert splits_for(512, 32768, 132, 64) == 1
    assert splits_for(1, 100, 132, 64) == 1
    assert all(math.log2(splits_for(rows, 8192, 100, 32)).is_integer() for rows in range(1, 50))
