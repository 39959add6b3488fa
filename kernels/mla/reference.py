"""The definition of right for latent attention, in plain PyTorch: expanded keys and values in fp64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention.reference import attention
from ..attention.spec import AttentionSpec
from .spec import MlaSpec


def mla(
    spec: MlaSpec,
    q_nope: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    *,
    tk: int | None = None,
    scale: float | None = None,
    q_offset: int | None = None,
    lengths: Tensor | None = None,
    cache_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out [B, H, T, Dv], lse [B, H, T]) in fp64; arguments as in MlaSpec.

    `cache_scale` fp32 [B, capacity] are int8 latents' scales.
    """
    tk = cache.shape[1] if tk is None else tk
    latents = cache[:, :tk].double()
    if spec.cache_dtype == "int8":
        assert cache_scale is not None
        latents = latents * cache_scale[:, :tk, None].double()
    c, r = latents.split([spec.kv_lora_rank, spec.qk_rope_head_dim], 2)
    k = torch.einsum("bjr,hdr->bhjd", c, w_uk.double())
    k = torch.cat([k, r.unsqueeze(1).expand(-1, spec.num_heads, -1, -1)], 3)
    v = torch.einsum("bjr,hrd->bhjd", c, w_uv.double())
    dense = AttentionSpec(
        spec.num_heads, spec.num_heads, spec.head_dim, spec.v_head_dim, mask=spec.mask, lse=True
    )
    q = torch.cat([q_nope.double(), q_rope.double()], 3)
    scale = spec.head_dim**-0.5 if scale is None else scale
    return attention(dense, q, k, v, scale=scale, q_offset=q_offset, lengths=lengths)


def reference_call(spec: MlaSpec, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Return (out in q's dtype, fp32 lse or None): the reference with the calling convention of a form."""
    options.pop("out", None)
    out, lse = mla(spec, *args, **options)
    return out.to(getattr(torch, spec.q_dtype)), lse.float() if spec.lse else None
