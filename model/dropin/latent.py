"""Latent attention (DeepSeek) over latents: one token makes no keys and values of the tokens before it.

transformers caches latents and expands all of them at every step: R (Dn + Dv) multiply-adds a head and cached
token. Absorbed into the query they cost 2 R + Dr (arXiv 2405.04434); see `kernels.mla`. An attention module
keeps its class; the instance gets an `expand_kv` that hands the latents on to our attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime import ops, torch_ops
from ...runtime.torch_ops import idle
from .layers import Linear

_CLASSES = {
    "transformers.models.deepseek_v2.modeling_deepseek_v2": "DeepseekV2Attention",
    "transformers.models.deepseek_v3.modeling_deepseek_v3": "DeepseekV3Attention",
}


class Absorbed:
    """w_uk [H, Dn, R] and w_uv [H, R, Dv] of a module, while its weight stays; nothing yet in a copy."""

    def __init__(self) -> None:
        self.held: tuple[Any, Tensor, Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Absorbed, ()


def known(module: nn.Module) -> bool:
    """Whether a module is latent attention that expands what it caches; in older transformers it does not."""
    kind = type(module)
    return _CLASSES.get(kind.__module__) == kind.__name__ and hasattr(kind, "expand_kv")


def install(attention: nn.Module) -> Callable[[], None]:
    """Let one token attend over latents; return what takes that away again."""
    attention.__dict__.update(_edgeformer=Absorbed(), expand_kv=functools.partial(expand_kv, attention))

    def restore() -> None:
        attention.__dict__.pop("expand_kv", None)
        attention.__dict__.pop("_edgeformer", None)

    return restore


def expand_kv(attention: Any, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values of latents [B, 1, T, R] and rotated keys [B, 1, T, Dr]; or both as they are.

    The latter are marked for our attention, which takes them or expands them (`attend`).
    """
    from .attention import NAME

    if not idle(kv_nope) or attention.config._attn_implementation != NAME:
        return type(attention).expand_kv(attention, kv_nope, k_rot)
    latents = kv_nope[:]
    latents.edgeformer_rotated = k_rot  # pyright: ignore[reportAttributeAccessIssue]
    return k_rot, latents


def attend(
    attention: Any, query: Tensor, latents: Tensor, rotated: Tensor, scale: float | None, plain: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """Return attention [B, 1, H, Dv] of one token over latents, or the expanded (keys, values) for others.

    query [B, H, T, Dn + Dr]; `plain` says that no mask, sinks or dropout come with it.
    """
    weights = _weights(attention) if plain and query.shape[2] == 1 else None
    if weights is None:
        return type(attention).expand_kv(attention, latents, rotated)
    module, w_uk, w_uv = weights
    tokens = latents.shape[2]
    if torch_ops._recorders:
        torch_ops.note("linear", _address(module), latents.shape[0])
        torch_ops.note("attention layer", id(attention), 1)
    q_nope, q_rope = query.split([w_uk.shape[1], rotated.shape[3]], 3)
    cache = torch.cat((latents, rotated), 3)[:, 0]
    out = ops.mla(q_nope, q_rope, cache, w_uk, w_uv, tk=tokens, scale=scale, mode="absorbed")
    return out.transpose(1, 2).contiguous()


def _address(module: Any) -> int:
    weight = module.weight
    return (weight.buffer if isinstance(module, Linear) else weight).data_ptr()


def _weights(attention: Any) -> tuple[Any, Tensor, Tensor] | None:
    """Return (kv_b_proj, w_uk, w_uv), or None where the product is somebody else's, or watched."""
    module, absorbed = attention.kv_b_proj, attention._edgeformer
    if type(module) not in (Linear, nn.Linear) or module._forward_hooks or module._forward_pre_hooks:
        return None
    source = module.weight.buffer if isinstance(module, Linear) else module.weight
    if source.is_inference() or source.device.type != "cpu":  # the former has no version
        return None
    key = (source.data_ptr(), source._version, module)
    held = absorbed.held
    if held is None or held[0] != key:
        values = module.weight.data if isinstance(module, Linear) else module.weight.detach()
        n, v = attention.qk_nope_head_dim, attention.v_head_dim
        values = values.view(-1, n + v, values.shape[1])
        with torch.inference_mode(False):
            w_uk, w_uv = values[:, :n].clone(), values[:, n:].transpose(1, 2).clone()
            held = absorbed.held = (key, w_uk.contiguous(), w_uv.contiguous())
    return module, held[1], held[2]
