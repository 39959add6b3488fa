"""What in somebody else's model our operators cover, and why the rest is left alone.

Nothing is taken by its name alone: a norm or an MLP counts as covered when its output on random input is
that of our operator's definition.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass
class Found:
    """One module: its kind ("linear", "mlp", "norm", "embedding", "attention", "other"), or why it is left.

    `parts` are the names of modules inside that are replaced with it; `options` what its replacement needs.
    """

    name: str
    module: nn.Module
    kind: str
    reason: str = ""
    parts: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def find(model: nn.Module) -> list[Found]:
    """Return every module that holds weights or attends, outermost first, each named once."""
    from .layers import Embedding, GatedMLP, Half, Linear, Norm

    ours = (Linear, GatedMLP, Norm, Embedding, Half)
    found: list[Found] = []
    inside: set[str] = set()
    heads = _tied(model)
    attention = _attention_modules(model)
    for name, module in model.named_modules():
        if name in inside:
            continue
        if type(module).__module__.startswith("peft.") and hasattr(module, "base_layer"):
            own = [n for n, _ in module.named_modules() if n and n.split(".")[0] != "base_layer"]
            inside |= {f"{name}.{n}" for n in own}  # the adapter's own layers train, and stay
            continue
        if isinstance(module, ours):
            inside |= {f"{name}.{child}" for child, _ in module.named_modules() if child}
            found.append(Found(name, module, "ours", "replaced before"))
            continue
        if id(module) in attention:
            found.append(Found(name, module, "attention"))
        entry = _classify(name, module, heads)
        if entry is not None:
            found.append(entry)
            inside |= set(entry.parts)
    return found


def _classify(name: str, module: nn.Module, heads: dict[int, str]) -> Found | None:
    if is_linear(module):
        return Found(name, module, "linear", unusable(module))
    gated = gated_parts(module)
    if gated is not None:
        parts = tuple(f"{name}.{part}" if name else part for part in gated[0])
        reason = "" if not _hooked(module) else "it has hooks, which a replacement would lose"
        if not reason:
            return Found(name, module, "mlp", parts=parts, options={"gate": gated[1]})
    if norm_like(module):
        reason, options = norm_options(module)
        return Found(name, module, "norm", reason, options=options)
    if isinstance(module, nn.Embedding):
        return _embedding(name, module, heads)
    own = [(n, p) for n, p in module.named_parameters(recurse=False) if p.dim() > 1]
    if own:
        what = ", ".join(f"{n} {tuple(p.shape)}" for n, p in own)
        return Found(name, module, "other", f"no operator covers {type(module).__name__} ({what})")
    return None


def _embedding(name: str, module: nn.Embedding, heads: dict[int, str]) -> Found:
    if id(module.weight) not in heads:
        return Found(name, module, "embedding", "a look-up of rows that no product shares")
    reason = unusable(module) or ("it renormalises its rows" if module.max_norm is not None else "")
    factor = 1.0 if reason else embedding_factor(module)
    if factor is None:
        reason = f"{type(module).__name__} gives other rows than its table's"
    return Found(
        name, module, "embedding", reason, options={"head": heads[id(module.weight)], "factor": factor}
    )


@torch.no_grad()
def embedding_factor(module: nn.Embedding) -> float | None:
    """Return what a table's rows are multiplied by (Gemma scales them); None: it computes something else."""
    ids = torch.arange(min(4, module.num_embeddings))
    if type(module) is nn.Embedding:
        return 1.0
    try:
        want = module(ids)
    except (TypeError, ValueError, RuntimeError):
        return None
    rows = module.weight[ids]
    if not isinstance(want, Tensor) or want.shape != rows.shape or not bool(rows.any()):
        return None
    factor = float((want.double() * rows.double()).sum() / rows.double().square().sum())
    return factor if _same(want, rows * factor) else None


def is_linear(module: nn.Module) -> bool:
    """Whether the module is torch's Linear or transformers' Conv1D (a transposed one), and no subclass."""
    return type(module) is nn.Linear or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' Conv1D: y = x @ weight + bias with weight [K, N]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def matrix(module: nn.Module) -> Tensor:
    """Return the weight [N, K] of a linear layer or an embedding."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if is_conv1d(module) else weight


def unusable(module: nn.Module) -> str:
    """Return why a module of a known type cannot be replaced, or ""."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.is_meta or hasattr(module, "_hf_hook"):
        return "its weight is offloaded or on the meta device"
    if weight.device.type != "cpu":
        return f"its weight lies on {weight.device}"
    if weight.layout != torch.strided:
        return f"its weight is sparse ({weight.layout})"
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}; float32, bfloat16 and float16 are covered"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"its weight is a {type(weight).__name__}, quantised or wrapped already"
    if min(weight.shape) < 1:
        return f"its weight {tuple(weight.shape)} is empty"
    if hasattr(module, "parametrizations"):
        return "its weight is parametrised"
    if _hooked(module):
        return "it has hooks, which a replacement would lose"
    return ""


def _hooked(module: nn.Module) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in names)


def gated_parts(module: nn.Module) -> tuple[tuple[str, ...], str] | None:
    """Return the names of a gated MLP's gate and up projections and its activation, or None."""
    children = dict(module.named_children())
    if any(True for _ in module.parameters(recurse=False)):
        return None
    if {"gate_proj", "up_proj", "down_proj"} <= set(children):
        names: tuple[str, ...] = ("gate_proj", "up_proj")
    elif {"gate_up_proj", "down_proj"} <= set(children):
        names = ("gate_up_proj",)
    else:
        return None
    rest = [c for n, c in children.items() if n not in (*names, "down_proj")]
    if any(True for c in rest for _ in c.parameters()) or len(rest) > 2:
        return None
    layers = [children[n] for n in names]
    if any(type(c) is not nn.Linear or c.bias is not None or unusable(c) for c in layers):
        return None
    activation = _gate_activation(module, names)
    return (names, activation) if activation else None


@torch.no_grad()
def _gate_activation(module: nn.Module, names: tuple[str, ...]) -> str:
    """Return the activation with which the module computes a gated MLP, "" if it computes something else."""
    from .layers import ACTIVATIONS

    children = dict(module.named_children())
    first = children[names[0]]
    assert isinstance(first, nn.Linear)
    x = _probe(2, first.in_features, first.weight.dtype)
    if any(isinstance(c, nn.Dropout) and c.p and module.training for c in children.values()):
        return ""
    hidden = [children[n](x) for n in names]
    gate, up = hidden if len(hidden) == 2 else hidden[0].chunk(2, -1)
    try:
        want = module(x)
    except (TypeError, ValueError, RuntimeError):  # another signature: not this kind of MLP
        return ""
    down = children["down_proj"]
    return next((n for n, act in ACTIVATIONS.items() if _same(want, down(act(gate) * up))), "")


def norm_like(module: nn.Module) -> bool:
    """Whether a module may be an RMSNorm or LayerNorm: by its type's name and a vector for a weight."""
    name = type(module).__name__
    weight = getattr(module, "weight", None)
    has_vector = isinstance(weight, Tensor) and weight.dim() == 1
    return has_vector and (
        isinstance(module, nn.LayerNorm | nn.RMSNorm) or name.endswith(("RMSNorm", "LayerNorm"))
    )


@torch.no_grad()
def norm_options(module: nn.Module) -> tuple[str, dict[str, Any]]:
    """Return ("", what `layers.Norm` needs), or (why the norm is left, {})."""
    reason = unusable(module)
    if reason:
        return reason, {}
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    eps = next(
        (float(e) for n in ("variance_epsilon", "eps") if (e := getattr(module, n, None)) is not None), None
    )
    if eps is None:
        eps = torch.finfo(weight.dtype).eps if isinstance(module, nn.RMSNorm) else 1e-6
    x = _probe(3, weight.shape[0], weight.dtype) * 2 + 0.25
    try:
        want = module(x)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"it does not take one tensor: {error}", {}
    kinds = [("layer", 0.0), ("rms", 0.0), ("rms", 1.0)]
    for kind, offset in kinds:
        got = _plain_norm(x, weight, bias, eps, kind, offset)
        if want.dtype == x.dtype and _same(want, got.to(x.dtype)):
            return "", {"eps": eps, "kind": kind, "weight_offset": offset}
    return f"{type(module).__name__} computes neither RMSNorm nor LayerNorm as we define them", {}


def _plain_norm(x: Tensor, weight: Tensor, bias: Any, eps: float, kind: str, offset: float) -> Tensor:
    values = x.float()
    if kind == "layer":
        values = values - values.mean(-1, keepdim=True)
    values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * (weight.float() + offset)
    return values if bias is None else values + bias.float()


def _probe(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


def _same(want: Any, got: Tensor) -> bool:
    if not isinstance(want, Tensor) or want.shape != got.shape:
        return False
    error = (want.double() - got.double()).norm() / want.double().norm().clamp_min(1e-12)
    return bool(error < _CLOSE[got.dtype])


def _tied(model: nn.Module) -> dict[int, str]:
    """Return, for each table that a linear layer shares, the layer's name."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        id(m.weight): name
        for name, m in model.named_modules()
        if type(m) is nn.Linear and id(m.weight) in tables
    }


def _attention_modules(model: nn.Module) -> set[int]:
    """Return the modules that call transformers' attention interface, by id."""
    if not is_transformers(model):
        return set()
    named = [
        m for m in model.modules() if "Attention" in type(m).__name__ and not isinstance(m, nn.ModuleList)
    ]
    holders = {
        id(m) for m in named if any("Attention" in type(c).__name__ for c in m.modules() if c is not m)
    }
    return {id(m) for m in named if id(m) not in holders}


def is_transformers(model: nn.Module) -> bool:
    """Whether the model (or one inside an adapter's wrapper) is a transformers model."""
    return transformers_model(model) is not None


def transformers_model(model: nn.Module) -> Any:
    """Return the outermost transformers model, or None; imports nothing."""
    library = sys.modules.get("transformers")
    if library is None:
        return None
    return next((m for m in model.modules() if isinstance(m, library.PreTrainedModel)), None)


def leaves(found: list[Found]) -> Iterator[Found]:
    """The entries that are not replaced."""
    return (entry for entry in found if entry.reason and entry.kind != "ours")
