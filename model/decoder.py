"""The Llama-family decoder, top to bottom: embed, blocks of attention and gated MLP, norm, head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..compiler.errors import CapacityError, UnsupportedError
from ..kernels.quant_matmul import CanonicalWeight, pack
from ..kernels.shared.memory import Arena
from ..runtime import ops
from ..runtime.kv_cache import KVCache, LayerKV
from .config import DecoderConfig
from .layers import Embedding, QuantLinear, RMSNorm
from .requantise import common_format, requantise


class Checkpoint(Protocol):
    """Where weights come from: one at a time, so that a file never lies in memory twice."""

    config: DecoderConfig

    def weight(self, name: str) -> CanonicalWeight: ...

    def vector(self, name: str) -> Tensor: ...


class Decoder(nn.Module):
    """A decoder that reads a KV cache and returns logits.

    ``rope_cos`` and ``rope_sin`` are float32 [context, rotary / 2].
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(
        self, config: DecoderConfig, embed: Embedding, layers: list[Block], norm: RMSNorm, head: QuantLinear,
        context: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        self.context = context
        self.embed = embed
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.head = head
        cos, sin = rope_tables(config, context)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.register_load_state_dict_post_hook(_share_head)

    @staticmethod
    def from_checkpoint(
        checkpoint: Checkpoint,
        *,
        context: int | None = None,
        target: Any = None,
        quantize: str | None = None,
        activation: str = "auto",
        progress: Callable[[int, int], None] | None = None,
    ) -> Decoder:
        """Build a decoder, packing one weight at a time; ``progress(done, total)`` counts layers."""
        if activation not in ("auto", "int8", "float"):
            raise UnsupportedError(
                f"activation {activation!r} is not supported; use 'auto', 'int8' or 'float'"
            )
        config, arena = checkpoint.config, Arena()

        def table(name: str) -> CanonicalWeight:
            return requantise(checkpoint.weight(name), quantize, table=True)

        def linear(
            *names: str, bias: Tensor | None = None, residual: bool = False, pair: bool = False
        ) -> QuantLinear:
            parts = common_format([requantise(checkpoint.weight(name), quantize) for name in names])
            joined = parts[0] if len(parts) == 1 else CanonicalWeight.cat(parts)
            weight = pack(joined, target, pair, arena)
            return QuantLinear(weight, bias=bias, activation=activation, residual=residual, target=target)

        def norm(name: str) -> RMSNorm:
            return RMSNorm(checkpoint.vector(name), config.norm_eps)

        embed = Embedding(pack(table("embed"), target, arena=arena), target=target)
        layers = []
        for i in range(config.num_layers):
            at = f"layers.{i}."
            bias = None
            if config.attention_bias:
                bias = torch.cat([checkpoint.vector(f"{at}{part}_bias") for part in "qkv"])
            qkv = linear(at + "q", at + "k", at + "v", bias=bias)
            gate_up = linear(at + "gate", at + "up", pair=True)
            layers.append(
                Block(config, norm(at + "attn_norm"), qkv, linear(at + "o", residual=True),
                      norm(at + "mlp_norm"), gate_up, linear(at + "down", residual=True))
            )  # fmt: skip
            if progress is not None:
                progress(i + 1, config.num_layers)
        tied = config.tie_embeddings
        head_weight = embed.weight if tied else pack(table("head"), target, arena=arena)
        head = QuantLinear(head_weight, activation=activation, target=target, saved=not tied)
        return Decoder(config, embed, layers, norm("norm"), head, context or config.max_context)

    def forward(
        self,
        ids: Tensor,
        cache: KVCache,
        position: int,
        lengths: Tensor | None = None,
        last_only: bool = True,
    ) -> Tensor:
        """Logits of a chunk of tokens, whose keys and values go into the cache at ``position``.

        Args:
            ids: int64 [B, T], or embeddings float32 [B, T, hidden_size].
            cache: holds the keys and values of slots 0 .. position.
            position: the slot of the chunk's first token, equal for all rows.
            lengths: int32 [B], for ragged rows padded on the left: row b holds its tokens in the
                last ``lengths[b]`` of the ``position + T`` slots. None: every slot is a token.
            last_only: only the last slot's logits.

        Returns:
            float32 [B, 1 or T, vocab_size].

        Raises:
            CapacityError: the chunk runs past the context.
        """
        x = ids if ids.is_floating_point() else self.embed(ids)  # [B, T, D]
        end = position + x.shape[1]
        if end > self.context or end > cache.capacity:
            raise CapacityError(
                f"{end} tokens do not fit the context of {min(self.context, cache.capacity)}; "
                "shorten the prompt or load the model with a larger context"
            )
        cos, sin = self.rope_rows(position, end, lengths)
        for i, layer in enumerate(self.layers):
            x = layer(x, cache.layer(i), position, cos, sin, lengths)
        if last_only:
            x = x[:, -1:]
        return self.head(self.norm(x))

    def rope_rows(self, start: int, end: int, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [T, R/2], or [B, T, R/2] where each row's first token is at position 0."""
        if lengths is None:
            return self.rope_cos[start:end], self.rope_sin[start:end]
        places = torch.arange(start, end) - (end - lengths.long())[:, None]
        places.clamp_(min=0)  # padding slots; nothing reads them
        return self.rope_cos[places], self.rope_sin[places]


class Block(nn.Module):
    """Attention and gated MLP, each behind its norm, each adding to the residual in its last product."""

    def __init__(
        self, config: DecoderConfig, attn_norm: RMSNorm, qkv: QuantLinear, o: QuantLinear,
        mlp_norm: RMSNorm, gate_up: QuantLinear, down: QuantLinear,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        self.attn_norm = attn_norm
        self.qkv = qkv
        self.o = o
        self.mlp_norm = mlp_norm
        self.gate_up = gate_up
        self.down = down

    def forward(
        self, x: Tensor, kv: LayerKV, position: int, cos: Tensor, sin: Tensor, lengths: Tensor | None
    ) -> Tensor:
        c = self.config
        batch, length, _ = x.shape
        heads = self.qkv(self.attn_norm(x)).view(batch, length, -1, c.head_dim).transpose(1, 2)
        rotated = c.num_heads + c.num_kv_heads
        qk = ops.rope(heads[:, :rotated], cos, sin, interleaved=c.rope_interleaved, rotary_dim=c.rotary_dim)
        kv.append(qk[:, c.num_heads :], heads[:, rotated:], position)
        mask = "causal" if lengths is None else "causal_lengths"
        math = "auto" if self.qkv.activation == "auto" else "float32"
        out = ops.attention_cached(qk[:, : c.num_heads], kv, position, mask=mask, lengths=lengths, math=math)
        x = self.o(out.transpose(1, 2).reshape(batch, length, -1), residual=x)
        return self.down(self.gate_up(self.mlp_norm(x)), residual=x)


def rope_tables(config: DecoderConfig, context: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, float32 [context, rotary / 2] (RoFormer, arXiv:2104.09864)."""
    exponent = torch.arange(0, config.rotary, 2, dtype=torch.float32) / config.rotary
    frequency = 1.0 / (config.rope_theta**exponent)
    if config.rope_factors is not None:
        frequency = frequency / torch.tensor(config.rope_factors)
    angle = torch.arange(context, dtype=torch.float32)[:, None] / config.rope_scale * frequency
    return angle.cos(), angle.sin()


def _share_head(decoder: nn.Module, _: Any) -> None:
    assert isinstance(decoder, Decoder)
    if decoder.config.tie_embeddings:
        decoder.head.weight = decoder.embed.weight
