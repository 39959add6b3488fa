"""The definition of right for attention, in plain PyTorch: dense scores in fp64, one softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .spec import KEY_BLOCK, AttentionSpec
from .vectors import dense_keys

_LOG2_E = 1.4426950408889634


def attention(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tk: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    lengths: Tensor | None = None,
    prefix: Tensor | None = None,
    bias: Tensor | None = None,
    block_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    scale: float | None = None,
    q_offset: int | None = None,
    pages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out [B, Hq, Tq, Dv], lse [B, Hq, Tq]); arguments as in AttentionSpec.

    `tk` is the number of keys in a blocked or paged cache (a strided one has its shape); `pages` int64
    [B, n] are the block numbers of a paged one: k [P, Hkv, D, 16], v [P, Hkv, 16, Dv].
    """
    k, v = dense(spec, k, v, tk, k_scale, v_scale, pages)
    batch, _, tq, _ = q.shape
    tk = k.shape[2]
    factor = spec.head_dim**-0.5 if scale is None else scale
    if spec.math == "bfloat16":
        inside = factor / softcap if softcap else factor * _LOG2_E
        q = (q.float() * torch.tensor(inside)).bfloat16()
        k, v = k.bfloat16().double(), v.bfloat16().double()
        factor = softcap or 1 / _LOG2_E  # what is left of it for the scores
    q = q.double()
    q_offset = tk - tq if q_offset is None else q_offset
    k, v = (x.repeat_interleave(spec.group, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * factor
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if spec.mask == "additive":
        assert bias is not None
        scores = scores + bias.double()
    seen = visible(spec, batch, tq, tk, q_offset, window, lengths, prefix, block_mask)
    scores = scores.masked_fill(~seen, -math.inf)
    largest = torch.full((batch, spec.num_heads, tq, 1), -math.inf, dtype=torch.float64)
    if tk:
        largest = scores.amax(3, keepdim=True)
    if sinks is not None:
        largest = torch.maximum(largest, sinks.double().view(1, -1, 1, 1))
    safe = largest.masked_fill(largest == -math.inf, 0.0)
    weights = torch.exp(scores - safe)
    total = weights.sum(3, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks.double().view(1, -1, 1, 1) - safe)
    out = _weighted_sum(weights, v, seen)
    out = torch.where(total == 0, torch.zeros_like(out), out / total)
    lse = (largest + torch.log(total)).squeeze(3)
    return out, lse


def reference_call(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Return (out in q's dtype, fp32 lse or None): the reference with the calling convention of a form."""
    out, lse = attention(spec, q, k, v, **options)
    return out.to(q.dtype), lse.float() if spec.lse else None


def visible(
    spec: AttentionSpec,
    batch: int,
    tq: int,
    tk: int,
    q_offset: int,
    window: int = 0,
    lengths: Tensor | None = None,
    prefix: Tensor | None = None,
    block_mask: Tensor | None = None,
) -> Tensor:
    """Return which keys each query sees, bool [B, Hq, Tq, Tk]."""
    p = torch.arange(q_offset, q_offset + tq).view(1, 1, tq, 1)
    j = torch.arange(tk).view(1, 1, 1, tk)
    seen = torch.ones(batch, spec.num_heads, tq, tk, dtype=torch.bool)
    if spec.mask in ("causal", "causal_lengths"):
        seen = seen & (j <= p)
    if spec.mask == "causal_lengths":
        assert lengths is not None
        seen = seen & (j >= tk - lengths.view(-1, 1, 1, 1).long())
    if spec.mask == "prefix":
        assert prefix is not None
        seen = seen & ((j <= p) | (j < prefix.view(-1, 1, 1, 1).long()))
    if spec.mask == "block":
        assert block_mask is not None
        fine = block_mask.repeat_interleave(spec.block, 2).repeat_interleave(spec.block, 3)
        seen = seen & fine[:, :, :tq, :tk]
    if window:
        seen = seen & ((p - j).abs() < window)
    return seen


def dense(
    spec: AttentionSpec,
    k: Tensor,
    v: Tensor,
    tk: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    pages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return k [B, Hkv, Tk, D] and v [B, Hkv, Tk, Dv] as fp64, whatever the layout and type."""
    if spec.layout == "latent":
        k = k.unsqueeze(1) if k.dim() == 3 else k
        v = k[..., : spec.v_head_dim]
    if spec.layout == "paged":
        assert pages is not None
        k, v = k[pages].transpose(1, 2), v[pages].transpose(1, 2).flatten(2, 3)
    if spec.layout == "vectors":
        k = dense_keys(k)
    if spec.layout in ("blocked", "paged"):
        b, h, blocks, d, _ = k.shape
        k = k.transpose(3, 4).reshape(b, h, blocks * KEY_BLOCK, d)
    if tk is not None:
        k, v = k[:, :, :tk], v[:, :, :tk]
    k, v = k.double(), v.double()
    if spec.kv_dtype == "int8":
        assert k_scale is not None
        assert v_scale is not None
        k = k * k_scale[:, :, : k.shape[2], None].double()
        v = v * v_scale[:, :, : v.shape[2], None].double()
    return k, v


def _weighted_sum(weights: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """weights @ v where an unseen key is left out, even if its value is NaN or Inf (0 * NaN is NaN)."""
    finite = torch.isfinite(v)
    out = weights @ v.masked_fill(~finite, 0.0)
    for b, h, j in (~finite.all(3)).nonzero().tolist():
        column = weights[b, h, :, j, None] * v[b, h, j].masked_fill(finite[b, h, j], 0.0)
        out[b, h] += column.masked_fill(~seen[b, h, :, j, None], 0.0)
    return out
