"""The decoder, top to bottom: embed, blocks of attention and gated MLP behind their norms, norm, head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..compiler.errors import CapacityError, UnsupportedError
from ..kernels.quant_matmul import CanonicalWeight, PackedWeight, pack
from ..kernels.shared.memory import Arena
from ..runtime import ops
from ..runtime.kv_cache import KVCache, LayerKV
from .config import ModelConfig
from .layers import Embedding, QuantLinear, RMSNorm
from .requantise import common_format, requantise, values_apart


class Checkpoint(Protocol):
    """Where weights come from: one at a time, so that a file never lies in memory twice."""

    config: ModelConfig

    def weight(self, name: str) -> CanonicalWeight: ...

    def vector(self, name: str) -> Tensor: ...


class Decoder(nn.Module):
    """A decoder that reads a KV cache and returns logits.

    ``rope_cos`` and ``rope_sin`` are float32 [kinds, context, rotary / 2], one kind for each of
    ``config.ropes``.
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(
        self, config: ModelConfig, embed: Embedding, layers: list[Block], norm: RMSNorm, head: QuantLinear,
        context: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        self.context = context
        self.embed = embed
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.head = head
        tables = [rope.tables(config.rotary, context) for rope in config.ropes]
        self.register_buffer("rope_cos", torch.stack([cos for cos, _ in tables]), persistent=False)
        self.register_buffer("rope_sin", torch.stack([sin for _, sin in tables]), persistent=False)
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
        place: Callable[[PackedWeight], PackedWeight] | None = None,
    ) -> Decoder:
        """Build a decoder, packing one weight at a time; ``progress(done, total)`` counts layers.

        ``place`` takes each packed weight elsewhere, such as to a device, and returns what stands for it.
        """
        if activation not in ("auto", "int8", "float"):
            raise UnsupportedError(
                f"activation {activation!r} is not supported; use 'auto', 'int8' or 'float'"
            )
        config, arena = checkpoint.config, Arena() if place is None else None

        def laid_out(weight: CanonicalWeight, pair: bool = False) -> PackedWeight:
            packed = pack(weight, target, pair, arena)
            return packed if place is None else place(packed)

        def read(name: str) -> CanonicalWeight:
            return requantise(checkpoint.weight(name), quantize, name)

        def linear(
            *names: str, biased: bool = False, residual: bool = False, pair: bool = False,
            parts: list[CanonicalWeight] | None = None,
        ) -> QuantLinear:  # fmt: skip
            parts = common_format(parts or [read(name) for name in names])
            joined = parts[0] if len(parts) == 1 else CanonicalWeight.cat(parts)
            weight = laid_out(joined, pair)
            bias = torch.cat([checkpoint.vector(f"{name}_bias") for name in names]) if biased else None
            return QuantLinear(weight, bias=bias, activation=activation, residual=residual,
                               gate=config.activation, target=target)  # fmt: skip

        def heads(at: str) -> dict[str, Any]:
            """Queries, keys and values as one product; as two where the values have another format."""
            names = [at + part for part in "qkv"]
            parts = [read(name) for name in names]
            biased, cut = config.attention_bias, 2 if values_apart([part.format for part in parts]) else 3
            values = linear(*names[2:], biased=biased, parts=parts[2:]) if cut == 2 else None
            return {"qkv": linear(*names[:cut], biased=biased, parts=parts[:cut]), "values": values}

        def norm(name: str) -> RMSNorm:
            return RMSNorm(checkpoint.vector(name), config.norm_eps)

        embed = Embedding(laid_out(read("embed")), config.embedding_scale, target=target)
        layers = []
        for i in range(config.num_layers):
            at, plain = f"layers.{i}.", not config.post_norms  # a plain product adds the residual itself
            layers.append(
                Block(
                    config,
                    i,
                    attn_norm=norm(at + "attn_norm"),
                    **heads(at),
                    q_norm=norm(at + "q_norm") if config.qk_norm else None,
                    k_norm=norm(at + "k_norm") if config.qk_norm else None,
                    o=linear(at + "o", biased=config.o_bias, residual=plain),
                    attn_post_norm=None if plain else norm(at + "attn_post_norm"),
                    mlp_norm=norm(at + "mlp_norm"),
                    gate_up=linear(at + "gate", at + "up", biased=config.mlp_bias, pair=True),
                    down=linear(at + "down", biased=config.mlp_bias, residual=plain),
                    mlp_post_norm=None if plain else norm(at + "mlp_post_norm"),
                )
            )
            if progress is not None:
                progress(i + 1, config.num_layers)
        tied = config.tie_embeddings
        head_weight = embed.weight if tied else laid_out(read("head"))
        head = QuantLinear(head_weight, activation=activation, softcap=config.logit_softcap, target=target,
                           saved=not tied)  # fmt: skip
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
        """Return cosines and sines [kinds, T, R/2]; [kinds, B, T, R/2] where each row starts at 0."""
        if lengths is None:
            return self.rope_cos[:, start:end], self.rope_sin[:, start:end]
        places = torch.arange(start, end) - (end - lengths.long())[:, None]
        places.clamp_(min=0)  # padding slots; nothing reads them
        return self.rope_cos[:, places], self.rope_sin[:, places]


class Block(nn.Module):
    """Attention and gated MLP, each behind its norm, each adding to the residual.

    The last product of a plain one adds the residual itself; with post norms its result passes one first.
    ``values`` is None where one weight, ``qkv``, holds queries, keys and values.
    """

    def __init__(
        self, config: ModelConfig, layer: int, *, attn_norm: RMSNorm, qkv: QuantLinear,
        values: QuantLinear | None,
        q_norm: RMSNorm | None, k_norm: RMSNorm | None, o: QuantLinear, attn_post_norm: RMSNorm | None,
        mlp_norm: RMSNorm, gate_up: QuantLinear, down: QuantLinear, mlp_post_norm: RMSNorm | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        self.window = config.window(layer)
        self.rope_kind = config.rope_kind(layer)
        self.attn_norm = attn_norm
        self.qkv = qkv
        self.values = values
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.o = o
        self.attn_post_norm = attn_post_norm
        self.mlp_norm = mlp_norm
        self.gate_up = gate_up
        self.down = down
        self.mlp_post_norm = mlp_post_norm

    def forward(
        self, x: Tensor, kv: LayerKV, position: int, cos: Tensor, sin: Tensor, lengths: Tensor | None
    ) -> Tensor:
        c = self.config
        batch, length, _ = x.shape
        normed = self.attn_norm(x)
        heads = self.qkv(normed)
        if self.values is not None:
            heads = torch.cat([heads, self.values(normed)], dim=-1)
        heads = heads.view(batch, length, -1, c.head_dim).transpose(1, 2)
        q, k, v = heads.split([c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)  # [B, H, T, D]
        qk = heads[:, : c.num_heads + c.num_kv_heads]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=1)
        qk = ops.rope(qk, cos[self.rope_kind], sin[self.rope_kind], interleaved=c.rope_interleaved,
                      rotary_dim=c.rotary_dim)  # fmt: skip
        kv.append(qk[:, c.num_heads :], v, position)
        out = ops.attention_cached(
            qk[:, : c.num_heads], kv, position,
            mask="causal" if lengths is None else "causal_lengths", lengths=lengths, window=self.window,
            softcap=c.attention_softcap, scale=c.scale,
            math="auto" if self.qkv.activation == "auto" else "float32",
        )  # fmt: skip
        x = _added(self.o, self.attn_post_norm, out.transpose(1, 2).reshape(batch, length, -1), x)
        return _added(self.down, self.mlp_post_norm, self.gate_up(self.mlp_norm(x)), x)


def _added(product: QuantLinear, post_norm: RMSNorm | None, y: Tensor, x: Tensor) -> Tensor:
    """Return x + product(y), or x + post_norm(product(y))."""
    return product(y, residual=x) if post_norm is None else post_norm(product(y), residual=x)


def _share_head(decoder: nn.Module, _: Any) -> None:
    assert isinstance(decoder, Decoder)
    if decoder.config.tie_embeddings:
        decoder.head.weight = decoder.embed.weight
