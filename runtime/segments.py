"""Attention of sequences of different lengths that stand one behind the other, without padding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.attention import OPERATOR as ATTENTION
from ..kernels.attention import AttentionSpec
from ..kernels.attention.space import fastest_math
from . import dispatch
from .dispatch import bound
from .ops import dtype_name


def attention_segments(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor | None:
    """Return bidirectional attention [1, N, Hq, Dv] within each of the sequences, or None without a kernel.

    q [1, Hq, N, D], k [1, Hkv, N, D] and v [1, Hkv, N, Dv] of one float type hold the sequences of `lengths`
    (which add up to N) one behind the other.
    """
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(1, q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype)
    strides = [s for x in (q, k, v, out.transpose(1, 2)) for s in x.stride()[1:3]]
    element, threads = q.element_size(), torch.get_num_threads()
    steps = [stride * element for stride in strides[1::2]]  # bytes from a token to the next
    places = [x.data_ptr() for x in (q, k, v, out)]
    calls: dict[int, Callable[..., None]] = {}
    for length in lengths:
        size = length.bit_length()
        call = calls.get(size)
        if call is None:
            call = _bind(q, k, v, length)
            if call is None:
                return None
            calls[size] = call
        call(threads, length, tuple(places), tuple(strides), scale)
        places = [place + length * step for place, step in zip(places, steps)]
    return out


def _bind(q: Tensor, k: Tensor, v: Tensor, length: int) -> Callable[..., None] | None:
    name = dtype_name(q, "q")
    math = fastest_math(length, name, dispatch.current_target())
    spec = AttentionSpec(q.shape[1], k.shape[1], q.shape[3], v.shape[3], name, name, "none", math=math)
    return getattr(bound(ATTENTION, spec, None, {"tq": length, "tk": length}), "segment", None)
