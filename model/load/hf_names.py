"""Hugging Face's tensor names and ours: where each of our weights lies in a checkpoint of theirs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...compiler.errors import FormatError, UnsupportedError
from ...kernels.quant_matmul import CanonicalWeight, WeightFormat
from ..config import ModelConfig
from .hf_config import config_from_hf

__all__ = ["Source", "TensorCheckpoint", "config_from_hf", "sources_from_hf", "tensors_from_hf"]

_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
_MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_GEMMA_NORMS = {
    "attn_norm": "input_layernorm", "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm", "mlp_post_norm": "post_feedforward_layernorm",
}  # fmt: skip
_EMBED = "embed_tokens.weight"
_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # computed from the config
_OTHER_PARTS = ("vision_tower.", "multi_modal_projector.")  # of Gemma 3: pictures, which text does not need
_FLOATS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Source:
    """A tensor of theirs: its name, which [start, stop) of how many rows, and what is added to its values."""

    name: str
    rows: tuple[int, int, int] | None = None  # None: all of them
    offset: float = 0.0  # 1 for Gemma's norms, which compute x * (1 + w)


def sources_from_hf(config: ModelConfig, names: Iterable[str]) -> dict[str, Source]:
    """Our name -> its source, for every weight of the decoder, among a checkpoint's tensor ``names``.

    Raises FormatError for a missing tensor, UnsupportedError for one that has no place in this decoder.
    """
    given = {name for name in names if not _IGNORED.search(name)}
    given = {name for name in given if not any(f".{part}" in f".{name}" for part in _OTHER_PARTS)}
    tables = [name for name in given if name == _EMBED or name.endswith("." + _EMBED)]
    if len(tables) != 1:
        raise FormatError(f"the checkpoint has {len(tables)} tensors {_EMBED!r}, not one")
    prefix = tables[0].removesuffix(_EMBED)
    head = _head_name(config, given)
    table = {ours: _source(config, ours, prefix, head) for ours in [*config.matrices(), *config.vectors()]}
    wanted = {source.name for source in table.values()}
    missing = sorted(wanted - given)
    if missing:
        raise FormatError(f"the checkpoint has no tensor {missing[0]!r} ({len(missing)} are missing)")
    extra = sorted(given - wanted - ({head} if config.tie_embeddings else set()))
    if extra:
        shown = ", ".join(extra[:3])
        raise UnsupportedError(f"{len(extra)} tensors have no place in this decoder: {shown}")
    return table


def tensors_from_hf(
    config: ModelConfig, get_tensor: Callable[[str], Tensor], names: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (our name, tensor) of every weight: matrices [N, K] in their own type, vectors float32.

    ``get_tensor`` takes one of ``names``. Errors as ``sources_from_hf``, and FormatError for a wrong shape.
    """
    checkpoint = TensorCheckpoint(config, get_tensor, names)
    for name in config.matrices():
        yield name, checkpoint.tensor(name)
    for name in config.vectors():
        yield name, checkpoint.vector(name)


class TensorCheckpoint:
    """A Hugging Face checkpoint under our names, one tensor at a time (see ``decoder.Checkpoint``).

    ``get_tensor`` reads a tensor by its name there. Errors as ``tensors_from_hf``; a tensor with NaN or Inf
    is a FormatError.
    """

    def __init__(
        self, config: ModelConfig, get_tensor: Callable[[str], Tensor], names: Iterable[str]
    ) -> None:
        self.config = config
        self.get_tensor = get_tensor
        self.sources = sources_from_hf(config, names)
        self._shapes: dict[str, tuple[int, ...]] = dict(config.matrices())
        self._shapes |= {name: (size,) for name, size in config.vectors().items()}

    def tensor(self, name: str) -> Tensor:
        """One tensor in its stored type, cut out of a fused one where it lies in one."""
        source = self.sources[name]
        found = self.get_tensor(source.name)
        if source.rows is not None:
            start, stop, total = source.rows
            if found.dim() < 1 or found.shape[0] != total:
                raise FormatError(
                    f"the tensor {source.name!r} has the shape {tuple(found.shape)}, expected {total} rows"
                )
            found = found[start:stop]
        if tuple(found.shape) != self._shapes[name]:
            shapes = f"{tuple(found.shape)}, expected {self._shapes[name]}"
            raise FormatError(f"the tensor {source.name!r} has the shape {shapes}")
        if found.dtype not in _FLOATS:
            raise UnsupportedError(
                f"the tensor {source.name!r} has the type {found.dtype}; use {', '.join(_FLOATS.values())}"
            )
        if not torch.isfinite(found).all():
            raise FormatError(f"the tensor {source.name!r} holds NaN or Inf; the file is damaged")
        return found

    def weight(self, name: str) -> CanonicalWeight:
        """One matrix in its stored type."""
        values = self.tensor(name).contiguous()
        return CanonicalWeight(WeightFormat.float(_FLOATS[values.dtype]), values)

    def vector(self, name: str) -> Tensor:
        """One norm weight or bias, float32."""
        values = self.tensor(name).float()
        return values + self.sources[name].offset if self.sources[name].offset else values


def _head_name(config: ModelConfig, given: set[str]) -> str:
    found = sorted(name for name in given if name == "lm_head.weight" or name.endswith(".lm_head.weight"))
    if len(found) > 1:
        raise FormatError(f"the checkpoint has {len(found)} heads: {', '.join(found)}")
    return found[0] if found else "lm_head.weight"


def _source(config: ModelConfig, ours: str, prefix: str, head: str) -> Source:
    gemma, fused = config.post_norms, config.architecture == "phi3"
    norm_offset = 1.0 if gemma else 0.0
    if ours in ("embed", "head"):
        return Source(prefix + _EMBED if ours == "embed" else head)
    if ours == "norm":
        return Source(prefix + "norm.weight", offset=norm_offset)
    _, layer, part = ours.split(".")
    at = f"{prefix}layers.{layer}."
    norms = _GEMMA_NORMS if gemma else _NORMS
    if part in norms:
        return Source(f"{at}{norms[part]}.weight", offset=norm_offset)
    if part in ("q_norm", "k_norm"):
        return Source(f"{at}self_attn.{part}.weight", offset=norm_offset)
    weight, kind = (part.removesuffix("_bias"), "bias") if part.endswith("_bias") else (part, "weight")
    if fused and weight in ("q", "k", "v"):
        return Source(f"{at}self_attn.qkv_proj.{kind}", _part_rows(config, weight))
    if fused and weight in ("gate", "up"):
        start = 0 if weight == "gate" else config.intermediate_size
        rows = (start, start + config.intermediate_size, 2 * config.intermediate_size)
        return Source(f"{at}mlp.gate_up_proj.{kind}", rows)
    if weight in _ATTENTION:
        return Source(f"{at}self_attn.{_ATTENTION[weight]}.{kind}")
    return Source(f"{at}mlp.{_MLP[weight]}.{kind}")


def _part_rows(config: ModelConfig, part: str) -> tuple[int, int, int]:
    """Rows of queries, keys or values in a fused projection."""
    q, kv, total = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.qkv_size
    return {"q": (0, q, total), "k": (q, q + kv, total), "v": (q + kv, total, total)}[part]
