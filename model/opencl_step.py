"""A decoder's step on an OpenCL device: kernels enqueued one after the other, nothing read until its end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention import OPERATOR as ATTENTION
from ..kernels.attention import AttentionSpec
from ..kernels.attention.append import OPERATOR as APPEND
from ..kernels.attention.append import AppendSpec
from ..kernels.attention.opencl import parts_shape, splits_of
from ..kernels.embedding import OPERATOR as EMBEDDING
from ..kernels.embedding.spec import EmbeddingSpec
from ..kernels.norm import OPERATOR as NORM
from ..kernels.norm.spec import NormSpec
from ..kernels.quant_matmul import OPERATOR as QUANT_MATMUL
from ..kernels.quant_matmul import PackedWeight, QuantMatmulSpec
from ..kernels.quant_matmul.packing import unpack
from ..kernels.quant_matmul.weight_format import CanonicalWeight
from ..kernels.rope import OPERATOR as ROPE
from ..kernels.rope.spec import RopeSpec
from ..runtime.dispatch import bound
from ..runtime.opencl import DeviceTensor, Session
from ..runtime.opencl_kv import KV_NAMES, DeviceKVCache
from .config import ModelConfig
from .decoder import Block, Decoder
from .layers import QuantLinear, RMSNorm

FORM = "tvm_opencl"


class DeviceWeight(PackedWeight):
    """A packed weight whose bytes are on the device alone; `unpack` reads them back."""

    def __init__(self, weight: PackedWeight, session: Session) -> None:
        size = torch.empty(weight.nbytes, dtype=torch.uint8, device="meta")
        super().__init__(size, weight.format, weight.n, weight.k, weight.layout)
        self.device = session.upload(weight.buffer)

    def unpack(self) -> CanonicalWeight:
        """Return the canonical form, bit for bit what was packed."""
        return unpack(PackedWeight(self.device.read(), self.format, self.n, self.k, self.layout))

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        return PackedWeight(self.device.read(), self.format, self.n, self.k, self.layout)


class Product:
    """A QuantLinear on the device: call(x, y, rows, residual)."""

    def __init__(self, layer: QuantLinear, session: Session) -> None:
        weight = layer.weight
        assert isinstance(weight, DeviceWeight)
        bias = layer.bias
        spec = QuantMatmulSpec(
            weight.n, weight.k, weight.format, "float", "float32", layer.epilogue, bias is not None,
            layer.residual, layer.softcap,
        )  # fmt: skip
        self._call = bound(QUANT_MATMUL, spec, FORM)
        self._weight = weight.device.buffer
        self._bias = None if bias is None else session.upload(bias.float())
        self.columns = spec.n_out

    def __call__(self, x: Any, y: Any, rows: int, residual: Any = None) -> None:
        self._call(x, self._weight, None if self._bias is None else self._bias.buffer, residual, y, rows)


class Norm:
    """An RMSNorm on the device: call(x, y, rows, residual, ...)."""

    def __init__(self, layer: RMSNorm, session: Session, residual: bool = False) -> None:
        self._call = bound(NORM, NormSpec("rms", layer.weight.shape[0], layer.eps, residual=residual), FORM)
        self._weight = session.upload(layer.weight.float())

    def __call__(self, x: Any, y: Any, rows: int, residual: Any = None, **places: Any) -> None:
        self._call(x, self._weight.buffer, None, residual, y, rows, **places)


class DeviceBlock:
    """One layer: its products and norms, window and table."""

    def __init__(self, block: Block, session: Session) -> None:
        product = lambda layer: None if layer is None else Product(layer, session)  # noqa: E731
        norm = lambda layer, **kw: None if layer is None else Norm(layer, session, **kw)  # noqa: E731
        self.window, self.rope_kind = block.window, block.rope_kind
        self.attn_norm, self.mlp_norm = Norm(block.attn_norm, session), Norm(block.mlp_norm, session)
        self.qkv, self.o = Product(block.qkv, session), Product(block.o, session)
        self.values = product(block.values)
        self.q_norm, self.k_norm = norm(block.q_norm), norm(block.k_norm)
        self.attn_post_norm = norm(block.attn_post_norm, residual=True)
        self.mlp_post_norm = norm(block.mlp_post_norm, residual=True)
        self.gate_up, self.down = Product(block.gate_up, session), Product(block.down, session)


class DeviceStep:
    """Runs chunks of tokens through a decoder whose weights are on a device."""

    def __init__(self, decoder: Decoder, session: Session, kv: str) -> None:
        c = self.config = decoder.config
        self.session, self.context, self.kv = session, decoder.context, kv
        embed = decoder.embed.weight
        assert isinstance(embed, DeviceWeight)
        self._table = embed.device.buffer
        self._embed = bound(EMBEDDING, EmbeddingSpec.of(embed, factor=decoder.embed.factor), FORM)
        self._blocks = [DeviceBlock(block, session) for block in decoder.layers if isinstance(block, Block)]
        self._norm, self._head = Norm(decoder.norm, session), Product(decoder.head, session)
        self._cos, self._sin = session.upload(decoder.rope_cos), session.upload(decoder.rope_sin)
        self._table_size = decoder.rope_cos[0].numel()
        rotary = RopeSpec(c.head_dim, c.rotary_dim or 0, c.rope_interleaved)
        self._rope = bound(ROPE, rotary, FORM)
        self._append = bound(APPEND, AppendSpec(c.head_dim, c.head_dim, kv_dtype=KV_NAMES[kv]), FORM)
        self._attention = {w: self._bind_attention(c, w) for w in {bool(b.window) for b in self._blocks}}
        self._held: dict[str, DeviceTensor] = {}

    def _bind_attention(
        self, c: ModelConfig, window: bool
    ) -> tuple[Callable[..., None], AttentionSpec]:  # fmt: skip
        spec = AttentionSpec(
            c.num_heads, c.num_kv_heads, c.head_dim, c.head_dim, kv_dtype=KV_NAMES[self.kv],
            mask="causal_lengths", layout="vectors", window=window, softcap=bool(c.attention_softcap),
        )  # fmt: skip
        return bound(ATTENTION, spec, FORM), spec

    def buffer(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> DeviceTensor:
        """Return a tensor that is kept from step to step, and grows when it has to."""
        held = self._held.get(name)
        if held is None or math.prod(held.shape) < math.prod(shape) or held.dtype != dtype:
            held = self._held[name] = self.session.empty(*shape, dtype=dtype)
        return DeviceTensor(self.session, held.buffer, shape, dtype)

    def __call__(
        self,
        ids: Tensor,
        cache: DeviceKVCache,
        position: int,
        pads: Tensor | None = None,
        last_only: bool = True,
    ) -> DeviceTensor:
        """Logits fp32 [B, V] of the last of tokens int64 [B, T], or [B * T, V] of all; nothing is waited for.

        `pads` int32 [B] are the slots at the left of each row that hold nothing.
        """
        c, session = self.config, self.session
        batch, tokens = ids.shape
        rows = batch * tokens
        cache.require_room(position, tokens)
        x, other = (self.buffer(n, rows, c.hidden_size).buffer for n in ("x", "other"))
        ids_held = self.buffer("ids", rows, dtype=torch.int32)
        session.write(ids_held, ids.int())
        pads_held = self.buffer("pads", batch, dtype=torch.int32)
        session.write(pads_held, torch.zeros(batch, dtype=torch.int32) if pads is None else pads)
        self._embed(ids_held.buffer, self._table, x, rows)
        for i, block in enumerate(self._blocks):
            self._run_block(block, cache, i, x, other, pads_held.buffer, batch, tokens, position)
        cache.length = position + tokens
        wanted = batch if last_only else rows
        last = self.buffer("last", wanted, c.hidden_size).buffer
        place = None
        if last_only:
            place = ((tokens - 1) * c.hidden_size, tokens * c.hidden_size, 0)
        self._norm(x, last, wanted, x_at=place)
        logits = self.buffer("logits", wanted, self._head.columns)
        self._head(last, logits.buffer, wanted)
        return logits

    def _run_block(
        self, block: DeviceBlock, cache: DeviceKVCache, layer: int, x: Any, other: Any, pads: Any, batch: int,
        tokens: int, position: int,
    ) -> None:  # fmt: skip
        c, rows = self.config, batch * tokens
        normed = self.buffer("normed", rows, c.hidden_size).buffer
        row_st, keys_first = block.qkv.columns, c.num_heads * c.head_dim
        heads = self.buffer("heads", rows, row_st).buffer
        block.attn_norm(x, normed, rows)
        block.qkv(normed, heads, rows)
        held = (heads, row_st, keys_first + c.num_kv_heads * c.head_dim)
        if block.values is not None:
            held = (self.buffer("values", rows, block.values.columns).buffer, block.values.columns, 0)
            block.values(normed, held[0], rows)
        for norm, count, first in (
            (block.q_norm, c.num_heads, 0),
            (block.k_norm, c.num_kv_heads, keys_first),
        ):
            if norm is not None:
                place = (first, row_st, c.head_dim)
                norm(heads, heads, rows * count, inner=count, x_at=place, y_at=place)
        self._rope(
            heads, self._cos.buffer, self._sin.buffer, pads, rows, tokens, position,
            c.num_heads + c.num_kv_heads, row_st, table=block.rope_kind * self._table_size,
        )  # fmt: skip
        kv = cache.buffers(layer)
        self._append(
            (heads, row_st, keys_first), held, *kv, rows, tokens, position, c.num_kv_heads, cache.slots
        )
        attended = self.buffer("attended", rows, keys_first).buffer
        attention, spec = self._attention[bool(block.window)]
        keys, parts = min(position + 1, block.window or position + 1), None
        units = self.session.limits.compute_units
        splits = splits_of(spec, units, batch, keys) if tokens == 1 else 1
        if splits > 1:
            parts = self.buffer("parts", *parts_shape(spec, batch, splits)).buffer
        attention(
            heads, *kv, pads, attended, batch, tokens, position, row_st, cache.slots, window=block.window,
            scale=c.scale, softcap=c.attention_softcap, splits=splits, parts=parts,
        )  # fmt: skip
        self._add(block.o, block.attn_post_norm, attended, x, other, rows)
        block.mlp_norm(other, normed, rows)
        inner = self.buffer("inner", rows, block.gate_up.columns).buffer
        block.gate_up(normed, inner, rows)
        self._add(block.down, block.mlp_post_norm, inner, other, x, rows)

    def _add(self, product: Product, post: Norm | None, y: Any, x: Any, to: Any, rows: int) -> None:
        """Write x + product(y), or x + post(product(y)), to `to`."""
        if post is None:
            product(y, to, rows, residual=x)
            return
        wide = self.buffer("post", rows, product.columns).buffer
        product(y, wide, rows)
        post(wide, to, rows, residual=x)
