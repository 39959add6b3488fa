"""A padded batch through a transformers encoder without its padding.

Sentences of a batch differ in length; the tokens that are there go through the layers one sequence behind the
other, attention stays within each. As for decoder layers, an encoder keeps its class, and the instance gets a
`forward` that takes the short way where nothing inside is watched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ...runtime.torch_ops import idle

# Encoders that hand keyword arguments down to attention's interface, and mix tokens nowhere else.
_CLASSES = {
    f"transformers.models.{family}.modeling_{family}": f"{name}Encoder"
    for family, name in (
        ("bert", "Bert"), ("roberta", "Roberta"), ("xlm_roberta", "XLMRoberta"), ("camembert", "Camembert"),
        ("electra", "Electra"),
    )
}  # fmt: skip
SEGMENTS = "edgeformer_segments"  # the keyword that tells attention the lengths
_MOST_VALID = 0.95  # of the slots of a batch: above it, packing costs what it saves


def known(encoder: nn.Module) -> bool:
    """Whether a module is an encoder of a class that the short way serves."""
    kind = type(encoder)
    config = getattr(encoder, "config", None)
    return (
        _CLASSES.get(kind.__module__) == kind.__name__
        and "forward" not in encoder.__dict__
        and not getattr(config, "is_decoder", False)
        and not getattr(config, "add_cross_attention", False)
    )


def install(encoder: nn.Module) -> Callable[[], None]:
    """Give an encoder the short way; return what takes it away again."""
    encoder.__dict__.update(forward=functools.partial(forward, encoder))

    def restore() -> None:
        encoder.__dict__.pop("forward", None)

    return restore


def forward(encoder: nn.Module, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
    """An encoder's forward: hidden_states [B, T, H] and what its class takes.

    Without gradients, hooks or tracing, slots that no query may see are left out; their rows of the result
    are zero (a plain encoder computes something there that no mask lets anybody see).
    """
    if args or torch.compiler.is_compiling():
        return type(encoder).forward(encoder, hidden_states, *args, **named)
    valid = _valid(encoder, hidden_states, named)
    if valid is None:
        return type(encoder).forward(encoder, hidden_states, **named)
    batch, slots, width = hidden_states.shape
    places = valid.reshape(-1).nonzero().view(-1)
    lengths = [length for length in valid.sum(1).tolist() if length]
    packed = hidden_states.reshape(batch * slots, width).index_select(0, places)[None]
    named |= {"attention_mask": None, SEGMENTS: lengths}
    result = type(encoder).forward(encoder, packed, **named)
    found = result.last_hidden_state
    whole = found.new_zeros(batch * slots, width).index_copy_(0, places, found[0])
    result["last_hidden_state"] = whole.view(batch, slots, width)
    return result


def _valid(encoder: nn.Module, x: Tensor, named: dict[str, Any]) -> Tensor | None:
    """Return bool [B, T] of the slots that are there, or None where the short way is not taken."""
    visible = named.get("attention_mask")
    if not idle(x) or encoder.training or not isinstance(visible, Tensor) or visible.dtype != torch.bool:
        return None
    if x.dim() != 3 or visible.shape[2:] != (x.shape[1], x.shape[1]) or visible.shape[:2] != (x.shape[0], 1):
        return None
    if visible.stride(2) != 0:  # queries may differ: some other mask than padding
        return None
    # A cache's positions come in transformers 5.0, though an encoder has none.
    rest = (v for name, v in named.items() if name not in ("attention_mask", "cache_position"))
    if any(value is not None and value is not False for value in rest):
        return None
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return None
    if any(m._forward_hooks or m._forward_pre_hooks for m in encoder.modules() if m is not encoder):
        return None
    valid = visible[:, 0, 0]
    count = int(valid.count_nonzero())
    return valid if 0 < count <= _MOST_VALID * valid.numel() else None
