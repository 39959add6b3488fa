"""Attention and its masks under transformers' registries: `attn_implementation="edgeformer"`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ...compiler.errors import UnsupportedError
from ...runtime import ops, torch_ops
from ...runtime.segments import attention_segments
from . import latent

NAME = "edgeformer"


@functools.cache
def register() -> None:
    """Make "edgeformer" known to transformers' AttentionInterface and AttentionMaskInterface."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Return the bool mask [B, 1, Tq, Tk] of a mask function, True is visible, or None for plain causal.

    The same contract as transformers' `sdpa_mask`, which makes it.
    """
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    padding = kwargs.get("attention_mask")
    plain = kwargs.get("mask_function") is bidirectional_mask_function and not args
    if plain and isinstance(padding, Tensor) and not torch.compiler.is_compiling():
        batch, keys = int(kwargs["batch_size"]), int(kwargs["kv_length"])
        places = kwargs.get("cache_position")  # of the queries, in transformers 5.0
        queries = int(kwargs["q_length"]) if places is None else len(places)
        here = padding.dtype == torch.bool and padding.shape == (batch, keys)
        if here and kwargs.get("kv_offset", 0) == 0:
            if kwargs.get("allow_is_bidirectional_skip") and bool(padding.all()):
                return None
            return padding[:, None, None, :].expand(batch, 1, queries, keys)  # no memory of its own
    return sdpa_mask(*args, **kwargs)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers calls it: query [B, Hq, Tq, D], key and value [B, Hkv, Tk, D].

    Returns ([B, Tq, Hq, Dv], None). What no kernel of ours covers (see `declined`) is computed by PyTorch.
    Raises UnsupportedError, naming the module, for a mask of the wrong shape.
    """
    segments = kwargs.get("edgeformer_segments")
    if segments is not None:
        return _within(module, query, key, value, segments, scaling), None
    rotated = None if torch.compiler.is_compiling() else getattr(value, "edgeformer_rotated", None)
    if rotated is not None:
        plain = attention_mask is None and s_aux is None and not dropout and softcap is None
        found = latent.attend(module, query, value, rotated, scaling, plain)
        if isinstance(found, Tensor):
            return found, None
        key, value = found
    cached = None if torch.compiler.is_compiling() else getattr(value, "edgeformer_layer", None)
    if cached is not None and attention_mask is None and s_aux is None and not dropout:
        out = cached.decode(query, scaling, softcap)
        if out is not None:
            if torch_ops._recorders:
                torch_ops.note("attention layer", id(module), 1)
            return out, None
    keys = value.shape[2]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    if causal and keys > query.shape[2] and cached is None:  # a static cache that was empty
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    elif attention_mask is not None:
        attention_mask = _fitting(module, attention_mask, query, keys)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    cap = 0.0 if softcap is None else float(softcap)
    reason = declined(query, value, dropout, kwargs)
    if reason:
        if cached is not None:
            key, value = cached.dense()
        return _by_pytorch(
            module, query, key, value, attention_mask, dropout, scale, causal, cap, s_aux, kwargs
        )
    if torch_ops._recorders:
        torch_ops.note("attention layer", id(module), query.shape[2])
    if cached is not None:
        return _over_cache(cached, query, attention_mask, causal, scale, cap, s_aux), None
    bias = None if attention_mask is None else additive(attention_mask)
    kind = "additive" if bias is not None else ("causal" if causal else "none")
    arguments = (query, key, value, bias, s_aux, kind, 0, cap, scale, 0)
    recording = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
    if torch_ops.direct(query) and not recording:
        return torch_ops.attend(*arguments), None
    return torch.ops.edgeformer.attention(*arguments), None


def _within(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float | None
) -> Tensor:
    """Attention within each of the sequences of `lengths`, one behind the other: [1, N, H, Dv]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out = None if declined(query, value, 0.0, {}) else attention_segments(query, key, value, lengths, scale)
    if out is not None:
        if torch_ops._recorders:
            torch_ops.note("attention layer", id(module), query.shape[2])
        return out
    parts = zip(*(x.split(lengths, 2) for x in (query, key, value)))
    attend = functools.partial(nn.functional.scaled_dot_product_attention, scale=scale, enable_gqa=True)
    return torch.cat([attend(*part) for part in parts], 2).transpose(1, 2).contiguous()


def declined(query: Tensor, value: Tensor, dropout: float, options: dict[str, Any]) -> str:
    """Return why PyTorch computes this call, or ""."""
    if dropout:
        return "attention with dropout (training)"
    if query.shape[-1] % 16 or value.shape[-1] % 16:
        return f"head sizes {query.shape[-1]} and {value.shape[-1]} are not multiples of 16"
    if query.dtype == torch.float64 or query.dtype != value.dtype:
        return f"queries of {query.dtype} on values of {value.dtype}"
    if query.device.type != "cpu" and not torch.compiler.is_compiling():
        return f"tensors on {query.device}"
    for name in ("position_bias", "cache", "cu_seq_lens_q"):
        if options.get(name) is not None:
            return f"attention with {name}"
    return ""


def additive(attention_mask: Tensor) -> Tensor:
    """Return the mask as a bias: 0 where a bool one is True, -inf elsewhere; kept with the mask."""
    if attention_mask.dtype != torch.bool:
        return attention_mask.float() if attention_mask.dtype == torch.float64 else attention_mask
    if torch.compiler.is_compiling():
        return _bias_of(attention_mask)
    bias = getattr(attention_mask, "edgeformer_bias", None)
    if bias is None:  # all layers of a step share one mask
        bias = _bias_of(attention_mask)
        attention_mask.edgeformer_bias = bias  # pyright: ignore[reportAttributeAccessIssue]
    return bias


def _bias_of(visible: Tensor) -> Tensor:
    return torch.zeros(visible.shape, device=visible.device).masked_fill(~visible, -torch.inf)


def _over_cache(
    cached: Any, query: Tensor, attention_mask: Tensor | None, causal: bool, scale: float, cap: float,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention over an EdgeFormerCache layer, in its own layout."""
    if torch_ops._recorders:
        torch_ops.note("attention", 0, query.shape[2])
    bias = None if attention_mask is None else additive(attention_mask)
    kind = "additive" if bias is not None else ("causal" if causal else "none")
    out = ops.attention_cached(
        query, cached.kv, cached.length - query.shape[2], mask=kind, bias=bias, softcap=cap, scale=scale,
        sinks=sinks, math="auto",
    )  # fmt: skip
    return out.transpose(1, 2).contiguous()


def _fitting(module: nn.Module, attention_mask: Tensor, query: Tensor, keys: int) -> Tensor:
    """Return the mask, broadcastable to [B, Hq, Tq, Tk] (longer ones are cut, as transformers does)."""
    shape = attention_mask.shape
    wanted = (query.shape[0], query.shape[1], query.shape[2])
    good = len(shape) == 4 and shape[3] >= keys
    if not good or any(have not in (1, want) for have, want in zip(shape, wanted)):
        name = f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')})"
        raise UnsupportedError(
            f"{name}: the attention mask is {tuple(shape)}, which does not broadcast to {(*wanted, keys)}"
        )
    return attention_mask if shape[3] == keys else attention_mask[..., :keys]


def _by_pytorch(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float, scale: float, causal: bool, cap: float, sinks: Tensor | None, options: dict[str, Any],
) -> tuple[Tensor, None]:  # fmt: skip
    if not cap and sinks is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out, _ = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scale,
            is_causal=causal,
            **options,
        )
        return out, None
    bias = None if attention_mask is None else additive(attention_mask)
    kind = "causal" if causal else "none"
    out = torch_ops.dense_attention(query, key, value, bias, sinks, kind, 0, cap, scale, 0, dropout)
    return out, None


def head_problem(module: nn.Module) -> str:
    """Return why no kernel of ours attends for this module, as far as its head sizes tell, or ""."""
    names = ("head_dim", "attention_head_size", "qk_head_dim", "v_head_dim")
    sizes = [getattr(module, name, None) for name in names]
    odd = [size for size in sizes if isinstance(size, int) and (size % 16 or size > 512)]
    return f"heads of {odd[0]} elements are not a multiple of 16 up to 512" if odd else ""
