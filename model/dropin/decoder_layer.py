"""One token through a transformers decoder layer by bare kernel calls, with no module in between.

A layer's class and modules stay as they are; the instance gets a `forward` that takes the short way where
nothing can tell the difference (see `forward`), and the class's own forward elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ...runtime import torch_ops
from ...runtime.torch_ops import idle
from .decoder_step import Step, make_step

# Classes whose forward is the one that `decoder_step` computes; a subclass is another class.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3")
_KNOWN = frozenset(
    (
        "attention_mask",
        "position_ids",
        "past_key_values",
        "use_cache",
        "position_embeddings",
        "cache_position",
    )
)
_CLOSE = {torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 2e-2}  # of what a layer adds
_eps = {dtype: torch.finfo(dtype).eps for dtype in _CLOSE}


def known(layer: nn.Module) -> bool:
    """Whether a module is a decoder layer of a class that the short way computes."""
    name = type(layer).__module__.removeprefix("transformers.models.")
    return (
        any(name == f"{family}.modeling_{family}" for family in FAMILIES)
        and type(layer).__name__.endswith("DecoderLayer")
        and "forward" not in layer.__dict__
    )


def install(layer: nn.Module) -> Callable[[], None]:
    """Give a layer the short way; return what takes it away again."""
    layer.__dict__.update(_edgeformer=Short(), forward=functools.partial(forward, layer))

    def restore() -> None:
        layer.__dict__.pop("forward", None)
        layer.__dict__.pop("_edgeformer", None)

    return restore


class Short:
    """What a layer's short way has bound: nothing yet in a copy or a pickle."""

    def __init__(self) -> None:
        self.step: Step | None = None
        self.checked = False
        self.reason = ""  # why it is never taken

    def __reduce__(self) -> tuple[Any, ...]:
        return Short, ()


def forward(layer: nn.Module, hidden_states: Tensor, *args: Any, **named: Any) -> Tensor:
    """A decoder layer's forward: hidden_states [B, T, H] and what its class takes.

    One token of one sequence over an EdgeFormerCache without a mask goes the short way, unless a gradient,
    autocast, tracing, a tensor subclass or a hook inside of the layer asks for its modules. The first such
    token goes both ways: a layer whose outputs differ by more than rounding never takes the short one.
    """
    if not args:
        out = _short(layer, hidden_states, named)
        if out is not None:
            return out
    return type(layer).forward(layer, hidden_states, *args, **named)


def _short(layer: nn.Module, x: Tensor, named: dict[str, Any]) -> Tensor | None:
    if not idle(x) or layer.training or named.get("attention_mask") is not None:
        return None
    cache, tables = named.get("past_key_values"), named.get("position_embeddings")
    if not getattr(cache, "handles", False) or tables is None or not x.is_contiguous():
        return None
    if not named.keys() <= _KNOWN and any(
        value is not None and value is not False for name, value in named.items() if name not in _KNOWN
    ):
        return None
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return None
    short: Short = layer.__dict__["_edgeformer"]
    step = short.step
    if step is None or not step.current(x.dtype):
        if short.reason:
            return None
        step = short.step = make_step(layer, x.dtype)
        if step is None:
            return None
    if x.shape != step.shape or step.watched():
        return None
    return step.run(x, cache, tables) if short.checked else _first(layer, short, step, x, named)


def _first(layer: nn.Module, short: Short, step: Step, x: Tensor, named: dict[str, Any]) -> Tensor | None:
    """Go both ways; the modules' output is the result."""
    held = named["past_key_values"].layers[step.index]
    before = held.length
    want = type(layer).forward(layer, x, **named)
    after, held.length = held.length, before
    with torch_ops.unrecorded():
        got = step.run(x, named["past_key_values"], named["position_embeddings"])
    held.length = after
    if got is None:
        return want
    error, added = (got.float() - want.float()).norm(), (want.float() - x.float()).norm()
    if bool(error <= _CLOSE[x.dtype] * added + _eps[x.dtype] * want.float().norm()):
        short.checked = True
        return want
    short.step, short.reason = None, f"its output differs by {float(error / added):.1%} from its modules'"
    held.length = before  # the token's key and value are the modules' again
    return type(layer).forward(layer, x, **named)
