"""Kernels at bare addresses for one token of one sequence: what decoding calls some hundred times a token.

Nothing is checked here. A caller checks shapes, types and strides once, and asks for the calls again when
`dispatch.generation()` changes. A call is None where a problem has no kernel for one row.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention import OPERATOR as ATTENTION
from ..kernels.attention import AttentionSpec
from ..kernels.attention.append import OPERATOR as APPEND
from ..kernels.attention.append import AppendSpec, addresses
from ..kernels.norm import OPERATOR as NORM
from ..kernels.norm.spec import NormSpec
from ..kernels.quant_matmul import PackedWeight
from ..kernels.quant_matmul.space import fastest_activation
from ..kernels.rope import OPERATOR as ROPE
from ..kernels.rope.spec import RopeSpec
from ..kernels.shared.memory import aligned_empty
from . import dispatch
from .dispatch import bound
from .kv_cache import LayerKV
from .ops import bind_matmul, dtype_name

_local = threading.local()


def workspace(nbytes: int) -> Tensor:
    """Return this thread's uint8 buffer for activations between calls, of at least `nbytes` bytes."""
    held: Tensor | None = getattr(_local, "workspace", None)
    if held is None or held.numel() < nbytes:
        with torch.inference_mode(False):  # it outlives the caller's mode
            held = _local.workspace = aligned_empty(nbytes)
    return held


def matmul_row(weight: PackedWeight, dtype: torch.dtype, bias: bool, epilogue: str, activation: str) -> Any:
    """Return `quant_matmul.bind.Row` of a product, called with (x, weight, bias or 0, y)."""
    if activation == "auto":
        activation = fastest_activation(1, weight.format, dispatch.current_target())
    call = bind_matmul(torch.empty(0, dtype=dtype), weight, bias, False, epilogue, activation, 0.0, None, 1)
    return getattr(call, "row", None)


def norm_row(
    weight: Tensor, dtype: torch.dtype, bias: bool, eps: float, kind: str, weight_offset: float,
    residual: bool = False,
) -> Callable[..., None] | None:  # fmt: skip
    """Return call(x, weight, bias or 0, y, residual or 0, rows=1) of a norm of contiguous rows."""
    names = (dtype_name(torch.empty(0, dtype=dtype), "x"), dtype_name(weight, "weight"))
    spec = NormSpec(kind, weight.shape[0], eps, *names, "", weight_offset, bias, residual=residual)
    return getattr(bound(NORM, spec), "row", None)


def rope_row(head_dim: int, rotary_dim: int, dtype: torch.dtype) -> Callable[..., None] | None:
    """Return call(x, cos, sin, y, heads) that rotates the heads of one position; y may be x."""
    spec = RopeSpec(head_dim, rotary_dim, False, dtype_name(torch.empty(0, dtype=dtype), "x"))
    return getattr(bound(ROPE, spec), "row", None)


def cache_rows(
    cache: LayerKV, heads: int, tk: int, dtype: torch.dtype, softcap: bool
) -> tuple[Callable[..., None], Callable[..., None]] | None:
    """Return append(k, v, cache, kv heads, position) and attend(threads, tk, q, cache, y, scale, softcap).

    `cache` there is what `cache_addresses` gives; the calls serve every tk of the same `bit_length`.
    """
    name, (d, dv) = dtype_name(torch.empty(0, dtype=dtype), "q"), (cache.k.shape[3], cache.v.shape[3])
    kv_heads = cache.k.shape[1]
    spec = AttentionSpec(heads, kv_heads, d, dv, name, cache.dtype, "none", "blocked", softcap=softcap)
    attend = getattr(bound(ATTENTION, spec, None, {"tq": 1, "tk": tk}), "row", None)
    append = getattr(bound(APPEND, AppendSpec(d, dv, name, cache.dtype)), "row", None)
    return None if attend is None or append is None else (append, attend)


def cache_addresses(cache: LayerKV) -> tuple[int, ...]:
    """Return where a layer's cache lies, as the calls of `cache_rows` take it."""
    return addresses(cache.k, cache.v, cache.k_scale, cache.v_scale)
