"""The operators as torch.library ops on plain tensors: for autograd, torch.compile and torch.export.

A packed weight enters as its buffer; `WeightFormat` and layout travel beside it as one word of text
(`weight_code`). Layers call `runtime.ops` directly where nothing watches (see `direct`): that is the same
computation without the dispatcher's microseconds.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.quant_matmul import PackedWeight, WeightFormat
from . import ops

# Looked up once: these run before every kernel.
_is_compiling, _grad = torch.compiler.is_compiling, torch.is_grad_enabled
_autocast = torch._C._is_any_autocast_enabled  # pyright: ignore[reportAttributeAccessIssue]
_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state
_transforms = torch._C._functorch.peek_interpreter_stack  # pyright: ignore[reportAttributeAccessIssue]
_ROWS = 1024  # rows of W that are dequantised at a time
_LIBRARY = torch.library.Library("edgeformer", "DEF")
_LIBRARY.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, int n, str code, str activation, str epilogue) -> Tensor"
)
_LIBRARY.define(
    "embedding(Tensor ids, Tensor weight, int n, int k, str code, ScalarType dtype, float factor=1.0) "
    "-> Tensor"
)
_LIBRARY.define(
    "norm(Tensor x, Tensor weight, Tensor? bias, float eps, str kind, float weight_offset) -> Tensor"
)
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sinks, str mask, int window, "
    "float softcap, float scale, int q_offset) -> Tensor"
)

Call = tuple[str, int, int]  # operator, what identifies its layer, rows
_recorders: list[list[Call]] = []


@contextmanager
def record_calls() -> Iterator[list[Call]]:
    """Collect (operator, address of its weight, rows) of every call of a kernel inside the block.

    Attention is recorded as ("attention", 0, queries); layers add ("attention layer", id, queries).
    """
    calls: list[Call] = []
    _recorders.append(calls)
    try:
        yield calls
    finally:
        _recorders.remove(calls)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Tell the recorders nothing inside the block: for a check, not a user's call."""
    held = _recorders[:]
    _recorders.clear()
    try:
        yield
    finally:
        _recorders[:] = held


def note(operator: str, identity: int, rows: int) -> None:
    """Tell the recorders, if there are any, that a kernel runs."""
    for calls in _recorders:
        calls.append((operator, identity, rows))


def direct(x: Tensor) -> bool:
    """Whether a kernel may be called on `x` without the dispatcher.

    Not under torch.compile, export and torch.jit.trace, with tensor subclasses, dispatch modes or functorch
    transforms. Nor where a gradient is recorded.
    """
    return not (
        torch.compiler.is_compiling()
        or x.__class__ is not Tensor
        or (torch.is_grad_enabled() and x.requires_grad)
        or _modes()
        or _transforms() is not None
        or _tracing() is not None
    )


def idle(x: Tensor) -> bool:
    """Whether nothing at all watches a call on `x`: no gradient mode, no autocast, and what `direct` asks."""
    return not (
        _is_compiling()
        or _grad()
        or x.__class__ is not Tensor
        or _modes()
        or _transforms() is not None
        or _tracing() is not None
        or _autocast()
        or not x.is_cpu
    )


def weight_code(weight: PackedWeight) -> str:
    """Return one word that says what a packed buffer holds."""
    return json.dumps([dataclasses.asdict(weight.format), weight.layout], separators=(",", ":"))


@functools.cache
def _decoded(code: str) -> tuple[WeightFormat, str]:
    fmt, layout = json.loads(code)
    return WeightFormat(**fmt), layout


def _packed(weight: Tensor, n: int, k: int, code: str) -> PackedWeight:
    fmt, layout = _decoded(code)
    return PackedWeight(weight, fmt, n, k, layout)


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, n: int, code: str, activation: str, epilogue: str
) -> Tensor:
    k = x.shape[-1]
    with torch.no_grad():
        return matmul(x, _packed(weight, n, k, code), bias, activation, epilogue)


def matmul(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str, epilogue: str = "none"
) -> Tensor:
    """Return `ops.quant_matmul`, told to the recorders; bias may have any float type."""
    if _recorders:
        note("linear", weight.buffer.data_ptr(), x.numel() // weight.k)
    if bias is not None and (bias.dtype != torch.float32 or not bias.is_contiguous()):
        bias = bias.float().contiguous()
    return ops.quant_matmul(x, weight, bias=bias, activation=activation, epilogue=epilogue)


def _linear_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, n: int, code: str, activation: str, epilogue: str
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n // 2 if epilogue.endswith("_pair") else n))


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.n, ctx.code, _, ctx.epilogue = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.k = x.shape[-1]
    gated = ctx.epilogue.endswith("_pair")
    ctx.save_for_backward(weight, x if gated else None, bias if gated else None)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Straight through the rounding of activations; the weight is dequantised block by block."""
    buffer, x, bias = ctx.saved_tensors
    grad_x, grad_bias = torch.ops.edgeformer.linear_backward(
        grad, buffer, x, bias, ctx.n, ctx.k, ctx.code, ctx.epilogue
    )
    if ctx.bias_dtype is not None:
        grad_bias = grad_bias.to(ctx.bias_dtype)
    return grad_x, None, grad_bias if ctx.bias_dtype is not None else None, None, None, None, None


_LIBRARY.define(
    "linear_backward(Tensor grad, Tensor weight, Tensor? x, Tensor? bias, int n, int k, str code, "
    "str epilogue) -> (Tensor, Tensor)"
)


def _linear_backward_kernel(
    grad: Tensor, buffer: Tensor, x: Tensor | None, bias: Tensor | None, n: int, k: int, code: str,
    epilogue: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    canonical = _packed(buffer, n, k, code).unpack()
    flat = grad.reshape(-1, grad.shape[-1]).float()
    if epilogue.endswith("_pair"):
        assert x is not None
        flat = _gate_gradient(flat, x.reshape(-1, k).float(), canonical, bias, epilogue)
    grad_x = torch.zeros(flat.shape[0], k)
    for start in range(0, n, _ROWS):
        block = canonical.slice_rows(start, min(start + _ROWS, n)).dequantize()
        grad_x += flat[:, start : start + _ROWS] @ block
    return grad_x.view(*grad.shape[:-1], k).to(grad.dtype), flat.sum(0)


def _gate_gradient(grad: Tensor, x: Tensor, canonical: Any, bias: Tensor | None, epilogue: str) -> Tensor:
    """The gradient of [gate, up] [M, N] behind act(gate) * up, whose gradient is `grad` [M, N / 2]."""
    hidden = x @ canonical.dequantize().T
    if bias is not None:
        hidden = hidden + bias.float()
    gate, up = hidden.chunk(2, -1)
    if epilogue == "silu_pair":
        sigmoid = torch.sigmoid(gate)
        value, slope = gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
    else:  # gelu by tanh
        root, cube = (2 / torch.pi) ** 0.5, 0.044715
        tanh = torch.tanh(root * (gate + cube * gate**3))
        value = 0.5 * gate * (1 + tanh)
        slope = 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh**2) * root * (1 + 3 * cube * gate**2)
    return torch.cat([grad * up * slope, grad * value], -1)


def _linear_backward_fake(
    grad: Tensor, buffer: Tensor, x: Tensor | None, bias: Tensor | None, n: int, k: int, code: str,
    epilogue: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return grad.new_empty((*grad.shape[:-1], k)), grad.new_empty((n,), dtype=torch.float32)


def _embedding(
    ids: Tensor, weight: Tensor, n: int, k: int, code: str, dtype: torch.dtype, factor: float = 1.0
) -> Tensor:
    return gather(ids, _packed(weight, n, k, code), dtype, factor)


def gather(ids: Tensor, weight: PackedWeight, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """Return `ops.embedding` in `dtype`, told to the recorders."""
    if _recorders:
        note("embedding", weight.buffer.data_ptr(), ids.numel())
    rows = ops.embedding(ids, weight, factor=factor)
    return rows if dtype == torch.float32 else rows.to(dtype)


def _embedding_fake(
    ids: Tensor, weight: Tensor, n: int, k: int, code: str, dtype: torch.dtype, factor: float = 1.0
) -> Tensor:
    return ids.new_empty((*ids.shape, k), dtype=dtype)


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str, weight_offset: float
) -> Tensor:
    """Return `ops.norm`, told to the recorders."""
    if _recorders:
        note("norm", weight.data_ptr(), x.numel() // max(1, x.shape[-1]))
    return ops.norm(x, weight, bias=bias, eps=eps, kind=kind, weight_offset=weight_offset)


def _norm_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str, weight_offset: float
) -> Tensor:
    return x.new_empty(x.shape)


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.eps, ctx.kind, ctx.weight_offset = inputs
    ctx.save_for_backward(x, weight, bias)


def _norm_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Gradients by hand in fp32: y = h * (w + offset) + b, h = (x - mean) / sqrt(var + eps)."""
    x, weight, bias = ctx.saved_tensors
    values, upstream = x.float(), grad.float()
    if ctx.kind == "layer":
        values = values - values.mean(-1, keepdim=True)
    inverse = torch.rsqrt(values.square().mean(-1, keepdim=True) + ctx.eps)
    normed = values * inverse
    scaled = upstream * (weight.float() + ctx.weight_offset)
    grad_x = scaled - normed * (scaled * normed).mean(-1, keepdim=True)
    if ctx.kind == "layer":
        grad_x = grad_x - scaled.mean(-1, keepdim=True)
    rows = tuple(range(grad.dim() - 1))
    grad_weight = (upstream * normed).sum(rows) if rows else upstream * normed
    grad_bias = None
    if bias is not None:
        grad_bias = (upstream.sum(rows) if rows else upstream).to(bias.dtype)
    return (grad_x * inverse).to(x.dtype), grad_weight.to(weight.dtype), grad_bias, None, None, None


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None, mask: str, window: int,
    softcap: float, scale: float, q_offset: int,
) -> Tensor:  # fmt: skip
    """Return `ops.attention` as [B, Tq, Hq, Dv] contiguous, told to the recorders.

    q [B, Hq, Tq, D], k [B, Hkv, Tk, D], v [B, Hkv, Tk, Dv]; `q_offset` is the position of the first query.
    """
    if _recorders:
        note("attention", 0, q.shape[2])
    out = ops.attention(
        q, k, v, mask=mask, bias=bias, sinks=sinks, window=window, softcap=softcap, scale=scale,
        q_offset=q_offset, math="auto",
    )  # fmt: skip
    return out.transpose(1, 2).contiguous()


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None, mask: str, window: int,
    softcap: float, scale: float, q_offset: int,
) -> Tensor:  # fmt: skip
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.mask, ctx.window, ctx.softcap, ctx.scale, ctx.q_offset = inputs
    ctx.save_for_backward(*tensors)


def _attention_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Gradients by hand in fp32 (no autograd inside autograd): softmax, softcap, groups of heads, sinks."""
    q, k, v, bias, sinks = ctx.saved_tensors
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (t.repeat_interleave(group, 1).float() for t in (k, v))
    weights, sink, slope = _softmax(
        q, wide_k, bias, sinks, ctx.mask, ctx.window, ctx.softcap, ctx.scale, ctx.q_offset
    )
    upstream = grad.transpose(1, 2).float()  # [B, H, Tq, Dv]
    pulled = upstream @ wide_v.transpose(2, 3)
    rows = (pulled * weights).sum(-1, keepdim=True)
    scores = weights * (pulled - rows)
    grad_bias = None if bias is None else _reduced(scores, bias.shape).to(bias.dtype)
    grad_sinks = None
    if sinks is not None and sink is not None:
        grad_sinks = -(sink * rows).sum((0, 2, 3)).to(sinks.dtype)
    if slope is not None:
        scores = scores * slope
    grad_q = scores @ wide_k * ctx.scale
    grad_k = scores.transpose(2, 3) @ q.float() * ctx.scale
    grad_v = weights.transpose(2, 3) @ upstream
    shared = lambda t: t.unflatten(1, (-1, group)).sum(2)  # noqa: E731
    return (
        grad_q.to(q.dtype), shared(grad_k).to(k.dtype), shared(grad_v).to(v.dtype), grad_bias, grad_sinks,
        None, None, None, None, None,
    )  # fmt: skip


def _reduced(x: Tensor, shape: torch.Size) -> Tensor:
    """Sum a tensor down to a shape that broadcasts to it."""
    axes = [i for i, (have, want) in enumerate(zip(x.shape, shape)) if have != want]
    return x.sum(axes, keepdim=True) if axes else x


def _softmax(
    q: Tensor, k: Tensor, bias: Tensor | None, sinks: Tensor | None, mask: str, window: int, softcap: float,
    scale: float, q_offset: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return weights [B, H, Tq, Tk], the sink's share [B, H, Tq, 1] and the softcap's slope, in fp32."""
    scores, slope = q.float() @ k.transpose(2, 3) * scale, None
    if softcap:
        capped = torch.tanh(scores / softcap)
        scores, slope = softcap * capped, 1 - capped * capped
    if bias is not None:
        scores = scores + bias.float()
    tq, tk = q.shape[2], k.shape[2]
    place = torch.arange(q_offset, q_offset + tq, device=q.device)[:, None] - torch.arange(
        tk, device=q.device
    )
    seen = place >= 0 if mask == "causal" else torch.ones_like(place, dtype=torch.bool)
    if window:
        seen = seen & (place.abs() < window)
    scores = scores.masked_fill(~seen, -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    sink = None
    if sinks is None:
        weights = F.softmax(scores, -1)
    else:
        column = sinks.float().view(1, -1, 1, 1).expand(scores.shape[0], -1, tq, 1)
        both = F.softmax(torch.cat([scores, column], -1), -1)
        weights, sink = both[..., :-1], both[..., -1:]
    return weights.masked_fill(empty, 0.0), sink, slope


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None, mask: str, window: int,
    softcap: float, scale: float, q_offset: int, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """The same in differentiable PyTorch, scores in fp32 and whole: [B, Tq, Hq, Dv] in q's dtype."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1).float() for t in (k, v))
    weights, _, _ = _softmax(q, k, bias, sinks, mask, window, softcap, scale, q_offset)
    out = F.dropout(weights, dropout) @ v
    return out.transpose(1, 2).to(q.dtype).contiguous()


def _register(name: str, kernel: Any, fake: Any, setup: Any = None, backward: Any = None) -> None:
    _LIBRARY.impl(name, kernel, "CPU")
    torch.library.register_fake(f"edgeformer::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"edgeformer::{name}", backward, setup_context=setup, lib=_LIBRARY)


_register("linear", _linear, _linear_fake, _linear_setup, _linear_backward)
_register("linear_backward", _linear_backward_kernel, _linear_backward_fake)
_register("embedding", _embedding, _embedding_fake)
_register("norm", norm, _norm_fake, _norm_setup, _norm_backward)
_register("attention", attend, _attention_fake, _attention_setup, _attention_backward)
