"""From a loaded library to a callable on torch tensors. Needs no TVM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...compiler.errors import UnsupportedError
from ...compiler.target import Target
from ..attention.bind import bind as bind_attention
from .spec import MlaSpec

Result = tuple[Tensor, Tensor | None]


def bind(
    spec: MlaSpec, configuration: Mapping[str, Any], target: Target, library: Any
) -> Callable[..., Result]:
    """Return call(q_nope, q_rope, cache, w_uk, w_uv, **options) -> (out, lse or None): see reference.py."""
    inner = bind_attention(spec.inner(), configuration, target, library)
    run = _absorbed(spec, library, inner) if spec.mode == "absorbed" else _expanded(spec, inner)

    def call(
        q_nope: Tensor, q_rope: Tensor, cache: Tensor, w_uk: Tensor, w_uv: Tensor, *,
        tk: int | None = None, scale: float | None = None, q_offset: int | None = None,
        lengths: Tensor | None = None, cache_scale: Tensor | None = None, out: Tensor | None = None,
    ) -> Result:  # fmt: skip
        tk = cache.shape[1] if tk is None else tk
        check(spec, q_nope, q_rope, cache, w_uk, w_uv, tk, cache_scale)
        batch, heads, tq, _ = q_nope.shape
        options = {
            "scale": spec.head_dim**-0.5 if scale is None else scale,
            "q_offset": tk - tq if q_offset is None else q_offset,
            "lengths": lengths,
        }
        if out is None:
            strides = (tq * heads * spec.v_head_dim, spec.v_head_dim, heads * spec.v_head_dim, 1)
            shape = (batch, heads, tq, spec.v_head_dim)
            out = torch.empty_strided(shape, strides, dtype=q_nope.dtype)
        if batch == 0 or tq == 0:
            return out, torch.empty(batch, heads, tq) if spec.lse else None
        scales = None if cache_scale is None else cache_scale[:, :tk]
        return run(q_nope, q_rope, cache[:, :tk], w_uk, w_uv, scales, out, options)

    return call


def _absorbed(spec: MlaSpec, library: Any, attention: Callable[..., Result]) -> Callable[..., Result]:
    absorb, project = library.function("absorb"), library.function("project")
    groups = spec.num_heads // spec.heads_at_once

    def run(
        q_nope: Tensor, q_rope: Tensor, cache: Tensor, w_uk: Tensor, w_uv: Tensor, scales: Tensor | None,
        out: Tensor, options: dict[str, Any],
    ) -> Result:  # fmt: skip
        batch, heads, tq, _ = q_nope.shape
        q_nope = q_nope if q_nope.stride(3) == 1 else q_nope.contiguous()
        q = torch.empty(batch, heads, tq, spec.latent_dim)
        q[..., spec.kv_lora_rank :] = q_rope
        _call(absorb, q_nope, w_uk, q)
        latents = cache.unsqueeze(1).expand(-1, groups, -1, -1)
        if scales is not None:
            scales = scales.unsqueeze(1).expand(-1, groups, -1)
        attended, lse = attention(
            q, latents, latents[..., : spec.kv_lora_rank], k_scale=scales, v_scale=scales, **options
        )
        _call(project, attended, w_uv, out)
        return out, lse

    return run


def _call(function: Callable[..., Any], x: Tensor, w: Tensor, y: Tensor) -> None:
    batch, heads, tq, _ = x.shape
    function(
        torch.get_num_threads(), batch, heads, tq, x.data_ptr(), w.data_ptr(), y.data_ptr(),
        *x.stride()[:3], *y.stride()[:3],
    )  # fmt: skip


def _expanded(spec: MlaSpec, attention: Callable[..., Result]) -> Callable[..., Result]:
    kind = torch.bfloat16 if spec.math == "bfloat16" else torch.float32
    count = spec.heads_at_once

    def run(
        q_nope: Tensor, q_rope: Tensor, cache: Tensor, w_uk: Tensor, w_uv: Tensor, scales: Tensor | None,
        out: Tensor, options: dict[str, Any],
    ) -> Result:  # fmt: skip
        batch, heads, tq, _ = q_nope.shape
        latents = cache.to(kind) if scales is None else (cache.float() * scales.unsqueeze(2)).to(kind)
        c, r = latents.unsqueeze(1).split([spec.kv_lora_rank, spec.qk_rope_head_dim], 3)
        q = torch.cat([q_nope, q_rope], 3)
        lse = torch.empty(batch, heads, tq) if spec.lse else None
        keys = torch.empty(batch, count, cache.shape[1], spec.head_dim, dtype=kind)
        keys[..., spec.qk_nope_head_dim :] = r
        for first in range(0, heads, count):
            some = slice(first, first + count)
            keys[..., : spec.qk_nope_head_dim] = c @ w_uk[some].to(kind).transpose(1, 2)
            values = c @ w_uv[some].to(kind)
            _, part = attention(q[:, some], keys, values, out=out[:, some], **options)
            if lse is not None and part is not None:
                lse[:, some] = part
        return out, lse

    return run


def check(
    spec: MlaSpec, q_nope: Tensor, q_rope: Tensor, cache: Tensor, w_uk: Tensor, w_uv: Tensor, tk: int,
    cache_scale: Tensor | None,
) -> None:  # fmt: skip
    """Raise UnsupportedError for what the kernels cannot read."""
    batch, _, tq, _ = q_nope.shape if q_nope.dim() == 4 else (0, 0, 0, 0)
    heads, rank = spec.num_heads, spec.kv_lora_rank
    wanted = {
        "q_nope": (q_nope, (batch, heads, tq, spec.qk_nope_head_dim), spec.q_dtype),
        "q_rope": (q_rope, (batch, heads, tq, spec.qk_rope_head_dim), spec.q_dtype),
        "w_uk": (w_uk, (heads, spec.qk_nope_head_dim, rank), spec.weight_dtype),
        "w_uv": (w_uv, (heads, rank, spec.v_head_dim), spec.weight_dtype),
    }
    for name, (tensor, shape, dtype) in wanted.items():
        if tuple(tensor.shape) != shape or tensor.dtype != getattr(torch, dtype):
            raise UnsupportedError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not {shape} {dtype}")
    if not (w_uk.is_contiguous() and w_uv.is_contiguous()):
        raise UnsupportedError("w_uk and w_uv must be contiguous: they are read as [H, Dn, R] and [H, R, Dv]")
    fits = cache.dim() == 3 and cache.shape[0] == batch and cache.shape[2] == spec.latent_dim
    if not fits or cache.dtype != getattr(torch, spec.cache_dtype):
        raise UnsupportedError(
            f"the cache is {tuple(cache.shape)} {cache.dtype}, not [{batch}, capacity, {spec.latent_dim}] "
            f"{spec.cache_dtype}"
        )
    if not 0 <= tk <= cache.shape[1]:
        raise UnsupportedError(f"tk={tk} does not fit a cache of {cache.shape[1]} tokens")
    if (cache_scale is not None) != (spec.cache_dtype == "int8"):
        raise UnsupportedError("int8 latents need cache_scale, and no others have one")
    if cache_scale is not None and (
        cache_scale.dtype != torch.float32 or cache_scale.dim() != 2 or cache_scale.shape[0] != batch
        or cache_scale.shape[1] < tk
    ):  # fmt: skip
        raise UnsupportedError(f"cache_scale is {tuple(cache_scale.shape)}, not float32 [{batch}, >= {tk}]")
