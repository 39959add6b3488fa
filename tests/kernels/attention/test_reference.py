"""The reference against PyTorch's own attention and against formulas written out."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from edgeformer.compiler.errors import UnsupportedError
from edgeformer.kernels.attention import AttentionSpec
from edgeformer.kernels.attention.reference import attention, visible
from edgeformer.kernels.attention.spec import causal_pairs, examples


def _inputs(spec: AttentionSpec, batch: int = 2, tq: int = 7, tk: int = 7):
    torch.manual_seed(0)
    q = torch.randn(batch, spec.num_heads, tq, spec.head_dim)
    k = torch.randn(batch, spec.num_kv_heads, tk, spec.head_dim)
    v = torch.randn(batch, spec.num_kv_heads, tk, spec.v_head_dim)
    return q, k, v


def test_equals_scaled_dot_product_attention() -> None:
    for mask in ("none", "causal"):
        spec = AttentionSpec(6, 2, 16, 32, mask=mask)
        q, k, v = _inputs(spec)
        expected = F.scaled_dot_product_attention(
            q.double(), k.double(), v.double(), is_causal=mask == "causal", enable_gqa=True
        )
        torch.testing.assert_close(attention(spec, q, k, v)[0], expected)


def test_bias_scale_and_lse() -> None:
    spec = AttentionSpec(4, 4, 16, 16, mask="additive")
    q, k, v = _inputs(spec, tq=3, tk=9)
    bias = torch.randn(1, 4, 3, 9)
    out, lse = attention(spec, q, k, v, bias=bias, scale=0.3)
    scores = q.double() @ k.double().transpose(2, 3) * 0.3 + bias.double()
    torch.testing.assert_close(lse, torch.logsumexp(scores, 3))
    torch.testing.assert_close(out, torch.softmax(scores, 3) @ v.double())


def test_softcap_comes_before_the_bias_and_sinks_only_divide() -> None:
    spec = AttentionSpec(2, 1, 16, 16, mask="additive", softcap=True, sinks=True)
    q, k, v = _inputs(spec, tq=2, tk=5)
    bias, sinks = torch.randn(2, 2, 2, 5), torch.tensor([0.5, -2.0])
    out, lse = attention(spec, q, k, v, bias=bias, softcap=1.5, sinks=sinks)
    scores = 1.5 * torch.tanh(q.double() @ k.double().transpose(2, 3) / 4 / 1.5) + bias.double()
    with_sink = torch.cat([scores, sinks.double().view(1, 2, 1, 1).expand(2, 2, 2, 1)], 3)
    torch.testing.assert_close(out, torch.softmax(with_sink, 3)[..., :-1] @ v.double().expand(2, 2, 5, 16))
    torch.testing.assert_close(lse, torch.logsumexp(with_sink, 3))


def test_who_sees_what() -> None:
    def rows(mask: str, **options) -> list[str]:
        spec = AttentionSpec(1, 1, 16, 16, mask=mask, block=2 if mask == "block" else 0)
        seen = visible(spec, 1, 3, 5, options.pop("q_offset", 2), **options)
        return ["".join("x" if s else "." for s in row) for row in seen[0, 0].tolist()]

    assert rows("causal") == ["xxx..", "xxxx.", "xxxxx"]
    assert rows("causal", window=2) == [".xx..", "..xx.", "...xx"]
    assert rows("none", window=2) == [".xxx.", "..xxx", "...xx"]
    assert rows("causal_lengths", lengths=torch.tensor([2])) == [".....", "...x.", "...xx"]
    assert rows("prefix", prefix=torch.tensor([4])) == ["xxxx.", "xxxx.", "xxxxx"]
    assert rows("causal", q_offset=-1) == [".....", "x....", "xx..."]
    mask = torch.tensor([[[[True, False, True], [False, True, False]]]])
    assert rows("block", block_mask=mask) == ["xx..x", "xx..x", "..xx."]


def test_an_unseen_key_has_no_influence_whatever_it_holds() -> None:
    spec = AttentionSpec(1, 1, 16, 16)
    q, k, v = _inputs(spec, batch=1)
    clean, _ = attention(spec, q, k, v)
    k[0, 0, 5], v[0, 0, 5] = torch.inf, torch.nan
    out, lse = attention(spec, q, k, v)
    torch.testing.assert_close(out[:, :, :5], clean[:, :, :5])
    assert out[:, :, 5:].isnan().all()
    assert lse[:, :, :5].isfinite().all()


def test_a_row_that_sees_nothing_is_zero() -> None:
    spec = AttentionSpec(2, 1, 16, 16, mask="causal_lengths")
    q, k, v = _inputs(spec, batch=2)
    out, lse = attention(spec, q, k, v, lengths=torch.tensor([0, 7]))
    assert (out[0] == 0).all()
    assert (lse[0] == -math.inf).all()
    assert lse[1].isfinite().all()
    out, lse = attention(spec, q, k[:, :, :0], v[:, :, :0], lengths=torch.tensor([0, 0]))
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_paged_and_latent_layouts() -> None:
    paged = AttentionSpec(2, 1, 16, 32, layout="paged", mask="none")
    q, k, v = _inputs(paged, batch=1, tq=2, tk=40)
    pages = torch.tensor([[3, 0, 2]])
    k_pages, v_pages = torch.zeros(4, 1, 16, 16), torch.zeros(4, 1, 16, 32)
    for i, page in enumerate(pages[0].tolist()):
        part = slice(16 * i, min(16 * i + 16, 40))
        k_pages[page, 0, :, : part.stop - part.start] = k[0, 0, part].T
        v_pages[page, 0, : part.stop - part.start] = v[0, 0, part]
    plain = AttentionSpec(2, 1, 16, 32, mask="none")
    torch.testing.assert_close(
        attention(paged, q, k_pages, v_pages, pages=pages, tk=40)[0], attention(plain, q, k, v)[0]
    )
    latent = AttentionSpec(4, 1, 48, 32, layout="latent", mask="none")
    q, k, _ = _inputs(latent, tq=2)
    expected = attention(AttentionSpec(4, 1, 48, 32, mask="none"), q, k, k[..., :32])[0]
    torch.testing.assert_close(attention(latent, q, k[:, 0], k[:, 0])[0], expected)


def test_spec_refuses_nonsense_and_names_itself() -> None:
    good = AttentionSpec(8, 8, 64, 64)
    for name, bad in (
        ("mask", "diagonal"),
        ("mask", "block"),
        ("layout", "packed"),
        ("kv_dtype", "int4"),
        ("q_dtype", "int8"),
    ):
        with pytest.raises(UnsupportedError):
            dataclasses.replace(good, **{name: bad})
    with pytest.raises(UnsupportedError, match="evenly"):
        AttentionSpec(9, 2, 64, 64)
    keys = [spec.key() for spec in examples()]
    assert len(set(keys)) == len(keys)


def test_counts() -> None:
    spec = AttentionSpec(9, 3, 64, 64, kv_dtype="int8")
    assert causal_pairs(3, 5) == 3 + 4 + 5
    assert causal_pairs(3, 5, window=4) == 3 + 4 + 4
    assert spec.operations(10) == 2 * 10 * 9 * 128
    assert spec.kv_bytes(10) == 10 * 3 * (128 + 8)
