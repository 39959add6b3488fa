"""Appending to the blocked KV cache: the operator, its reference and its CPU form's binding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...compiler.operator import Configuration, Declined, Form, Operator, reference_form, single_configuration
from ...compiler.target import Target
from . import tvm_opencl_append
from .append_spec import AppendSpec
from .spec import KEY_BLOCK

__all__ = ["OPERATOR", "AppendSpec"]

_PARALLEL_ELEMENTS = 1 << 15  # below it the launch costs more than the second thread saves


def reference(
    spec: AppendSpec,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    position: int,
) -> None:
    """Store k and v at slots [position, position + T) of the cache tensors (in place)."""
    k, v = k.float(), v.float()
    slots = slice(position, position + k.shape[2])
    if spec.kv_dtype == "int8":
        assert k_scale is not None
        assert v_scale is not None
        k, k_scale[:, :, slots] = quantize(k)
        v, v_scale[:, :, slots] = quantize(v)
    v_cache[:, :, slots] = v.to(v_cache.dtype)
    for t in range(k.shape[2]):
        block, inside = divmod(position + t, KEY_BLOCK)
        k_cache[:, :, block, :, inside] = k[:, :, t].to(k_cache.dtype)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (as fp32) and scales [..., T] of x [..., T, D]."""
    largest = x.abs().amax(-1)
    finite = torch.isfinite(x).all(-1)
    most = torch.full_like(largest, 127.0)  # `127 / tensor` is reciprocal() * 127, rounded twice
    inverse = torch.where((largest > 0) & finite, most / largest, torch.zeros_like(largest))
    codes = (x * inverse.unsqueeze(-1)).round().clamp(-127, 127).nan_to_num(0.0, 0.0, 0.0)
    return codes, torch.where(finite, largest / 127, torch.full_like(largest, torch.nan))


def _decide(spec: AppendSpec, target: Target) -> Declined | None:
    if "tvm_llvm" not in target.backends:
        return Declined(f"{target.name} lists no tvm_llvm back end")
    if spec.head_dim % 16 or spec.v_head_dim % 16:
        return Declined(f"head sizes {spec.head_dim} and {spec.v_head_dim} are not multiples of 16")
    return None


def _lower(spec: AppendSpec, configuration: Configuration, target: Target) -> list[Any]:
    from .tvm_append import lower

    return lower(spec, configuration, target)


def _bind(
    spec: AppendSpec, configuration: Configuration, target: Target, library: Any
) -> Callable[..., None]:
    serial, threaded = library.function("append"), library.function("append_parallel")

    def call(
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k_scale: Tensor | None,
        v_scale: Tensor | None,
        position: int,
    ) -> None:
        batch, heads, tokens, dim = k.shape
        function = threaded if batch * heads * tokens * dim >= _PARALLEL_ELEMENTS else serial
        scales = (0, 0, 0, 0)
        if k_scale is not None and v_scale is not None:
            scales = (k_scale.data_ptr(), v_scale.data_ptr(), *k_scale.stride()[:2])
        function(
            batch, heads, tokens, position,
            k.data_ptr(), *k.stride()[:3], v.data_ptr(), *v.stride()[:3],
            k_cache.data_ptr(), *k_cache.stride()[:2], v_cache.data_ptr(), *v_cache.stride()[:2],
            *scales,
        )  # fmt: skip

    def row(k: int, v: int, cache: tuple[int, ...], heads: int, position: int) -> None:
        """One token of one sequence, its heads side by side, at bare addresses, unchecked.

        `cache` are the addresses and strides of `addresses`.
        """
        k_at, k_sb, k_sh, _, v_at, v_sb, v_sh, _, ks, ks_sb, ks_sh, vs, _, _ = cache
        serial(
            1, heads, 1, position, k, 0, spec.head_dim, 0, v, 0, spec.v_head_dim, 0,
            k_at, k_sb, k_sh, v_at, v_sb, v_sh, ks, vs, ks_sb, ks_sh,
        )  # fmt: skip

    call.row = row  # pyright: ignore[reportFunctionMemberAccess]
    return call


def addresses(k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> tuple[int, ...]:
    """Return where a blocked cache lies: k's and v's address, batch, head and token strides, then scales."""
    scales: tuple[int, ...] = (0,) * 6
    if k_scale is not None and v_scale is not None:
        scales = (k_scale.data_ptr(), *k_scale.stride()[:2], v_scale.data_ptr(), *v_scale.stride()[:2])
    return (k.data_ptr(), *k.stride()[:2], KEY_BLOCK, v.data_ptr(), *v.stride()[:3], *scales)


TVM_CPU = Form(
    name="tvm_cpu",
    backend="tvm_llvm",
    decide=_decide,
    space=single_configuration,
    bind=_bind,
    lower=_lower,
    sources=("kernels/attention", "kernels/shared", "compiler/backends/tvm_llvm.py"),
)
OPERATOR = Operator(
    "kv_append", AppendSpec, reference, (TVM_CPU, tvm_opencl_append.FORM, reference_form(reference))
)
