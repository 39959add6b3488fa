"""Attention over a KV cache, and over latents, as problems of `bench ops`."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch.nn import functional as F

from ..compiler.measure import EVICTING
from ..kernels.attention import AttentionSpec
from ..kernels.attention.spec import causal_pairs
from ..runtime import ops
from ..runtime.kv_cache import KVCache
from .op_cases import COMPARED_ROWS, Problem, relative_error


def attention_spec(s: dict[str, Any]) -> AttentionSpec:
    """Return the spec of a model's attention over a bf16 cache."""
    d = s["head_dim"]
    return AttentionSpec(s["heads"], s["kv_heads"], d, d, kv_dtype="bfloat16", layout="blocked")


def attention_problem(s: dict[str, Any], tokens: int, context: int, form: str | None, l3: int) -> Problem:
    """Return `tokens` queries behind `context` cached tokens, causal, beside scaled_dot_product_attention."""
    heads, kv_heads, d = s["heads"], s["kv_heads"], s["head_dim"]
    nbytes = attention_spec(s).kv_bytes(context)
    cached = nbytes * s["layers"] <= l3
    layers = 1 if cached else min(s["layers"], math.ceil(EVICTING * l3 / nbytes))
    cache = KVCache(layers, 1, kv_heads, d, context)
    for i in range(layers):
        for part in (cache.layer(i).k, cache.layer(i).v):
            part.copy_(torch.randn(part.shape[-2:]).expand_as(part) if i else torch.randn(part.shape))
    cache.length = context
    q, position = torch.randn(1, heads, tokens, d), context - tokens
    turn = itertools.cycle([cache.layer(i) for i in range(layers)])
    ours = lambda: ops.attention_cached(q, next(turn), position, math="auto", form=form)  # noqa: E731

    plain = [_plain(cache.layer(i), context) for i in range(layers)]
    half, mask = q.bfloat16(), None
    if tokens > 1:
        mask = torch.ones(tokens, context, dtype=torch.bool).tril_(position)
    theirs = itertools.cycle(plain)

    def sdpa() -> Any:
        k, v = next(theirs)
        square = tokens == context
        return F.scaled_dot_product_attention(
            half, k, v, attn_mask=None if square else mask, is_causal=square and tokens > 1, enable_gqa=True
        )

    def error() -> float:
        layer = cache.layer(0)
        got = ops.attention_cached(q, layer, position, math="auto", form=form)[:, :, -COMPARED_ROWS:]
        few = q[:, :, -COMPARED_ROWS:].contiguous()
        return relative_error(got, ops.attention_cached(few, layer, context - few.shape[2], form="reference"))

    operations = attention_spec(s).operations(causal_pairs(tokens, context))
    moved = nbytes + 2 * q.nbytes
    return Problem(ours, {"torch sdpa bf16": sdpa}, error, operations, moved, tokens, cached, "float")


def _plain(layer: Any, context: int) -> tuple[Any, Any]:
    """Return a layer's keys and values as torch wants them: bf16 [1, heads, context, head_dim]."""
    b, h, blocks, d, width = layer.k.shape
    k = layer.k.permute(0, 1, 2, 4, 3).reshape(b, h, blocks * width, d)[:, :, :context]
    return k.contiguous(), layer.v[:, :, :context].contiguous()


def mla_problem(s: dict[str, Any], tokens: int, context: int, form: str | None, l3: int) -> Problem:
    """Return latent attention of `tokens` queries, beside the absorbed form in bf16 PyTorch."""
    heads, rank, nope = s["heads"], s["kv_lora_rank"], s["qk_nope_head_dim"]
    rope, v = s["qk_rope_head_dim"], s["v_head_dim"]
    latents = torch.randn(1, context, rank + rope).bfloat16()
    w_uk, w_uv = (
        torch.randn(heads, *shape).div_(rank**0.5).bfloat16() for shape in ((nope, rank), (rank, v))
    )
    q_nope, q_rope = torch.randn(1, heads, tokens, nope), torch.randn(1, heads, tokens, rope)
    ours = lambda: ops.mla(q_nope, q_rope, latents, w_uk, w_uv, form=form)  # noqa: E731
    half_nope, half_rope = q_nope.bfloat16(), q_rope.bfloat16()
    mask = torch.ones(tokens, context, dtype=torch.bool).tril_(context - tokens)
    scale = (nope + rope) ** -0.5

    def absorbed() -> Any:
        q = torch.cat([half_nope @ w_uk, half_rope], -1)
        shared = latents[:, None].expand(-1, heads, -1, -1)
        out = F.scaled_dot_product_attention(q, shared, shared[..., :rank], attn_mask=mask, scale=scale)
        return out @ w_uv

    def error() -> float:
        rows = slice(max(0, tokens - COMPARED_ROWS), tokens)
        nope_rows, rope_rows = (part[:, :, rows].contiguous() for part in (q_nope, q_rope))
        return relative_error(
            ours()[:, :, rows], ops.mla(nope_rows, rope_rows, latents, w_uk, w_uv, form="reference")
        )

    pairs = causal_pairs(tokens, context)
    absorbed_operations = heads * (2 * pairs * (2 * rank + rope) + 2 * tokens * rank * (nope + v))
    expanded_operations = heads * (2 * pairs * (nope + rope + v) + 2 * context * rank * (nope + v))
    moved = latents.nbytes + w_uk.nbytes + w_uv.nbytes
    return Problem(
        ours, {"torch bf16 absorbed": absorbed}, error, min(absorbed_operations, expanded_operations), moved,
        tokens, moved <= l3, "float",
    )  # fmt: skip
