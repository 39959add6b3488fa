"""A transformers Cache in our layout: keys in blocks of 16 tokens, grown in place instead of concatenated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from ...compiler.errors import UnsupportedError
from ...kernels.attention.spec import KEY_BLOCK
from ...runtime import dispatch, ops, rows
from ...runtime.kv_cache import KVCache, LayerKV
from ...runtime.torch_ops import idle
from .attention import NAME

_FIRST_CAPACITY = 256
_OF_DTYPE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class EdgeFormerLayer(CacheLayerMixin):
    """One layer: a view of its EdgeFormerCache's store; `length` tokens are valid."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, owner: EdgeFormerCache, index: int) -> None:
        self.owner, self.index, self.length = owner, index, 0
        self.is_initialized = False
        self._row: Any = None  # the kernels of one token, and what they are bound to

    @property
    def kv(self) -> LayerKV:
        """Keys and values of this layer in the blocked layout."""
        store = self.owner.store
        assert store is not None
        return store.layer(self.index)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the store for the first keys [B, H, T, D] and values [B, H, T, Dv]."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values; return what the attention reads.

        With our attention that is a pair of views marked with this layer (the keys among them are NaN, so
        that no other reader can use them unnoticed); else the dense keys and values.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        self.owner.reserve(end, key_states, value_states)
        kv = self.kv
        kv.cache.length = max(kv.cache.length, self.length)
        if torch.is_grad_enabled():
            key_states, value_states = key_states.detach(), value_states.detach()
        kv.append(key_states, value_states, self.length)
        self.length = end
        if not self.owner.handles:
            return self.dense()
        value = kv.v[:, :, :end]
        value = value if value.dtype == self.dtype else value.to(self.dtype)
        value.edgeformer_layer = self  # pyright: ignore[reportAttributeAccessIssue]
        return self.owner.unreadable.expand(*kv.k.shape[:2], end, kv.k.shape[3]), value

    def decode(self, query: Tensor, scale: float | None, softcap: float | None) -> Tensor | None:
        """Return attention of one query a row [B, 1, H, Dv] over all tokens, or None for other queries."""
        if query.shape[2] != 1 or not self.owner.aligned or not idle(query):
            return None
        out = ops.decode_attention(query, self.kv, self.length - 1, softcap=softcap or 0.0, scale=scale)
        return out.transpose(1, 2)  # contiguous: the kernel writes [B, 1, H, Dv]

    def one_row(
        self, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, softcap: float
    ) -> tuple[Any, Any, tuple[int, ...]] | None:
        """Return `rows.cache_rows` and `rows.cache_addresses` for one more token of one sequence, or None.

        None where it has no room (`update` makes some), or holds other heads.
        """
        store, length = self.owner.store, self.length
        if store is None or not self.is_initialized or length >= store.capacity:
            return None
        kv, row = store._layers[self.index], self._row
        asked = (heads, kv_heads, head_dim, dtype, softcap, (length + 1).bit_length(), dispatch.generation())
        if (
            row is None or row[0] != asked or row[1] is not kv.k or row[2] is not kv.v
            or row[3][2][0] != kv.k.data_ptr()  # a copied cache
        ):  # fmt: skip
            if kv.k.shape[:2] != (1, kv_heads) or kv.k.shape[3] != head_dim or kv.v.shape[3] != head_dim:
                return None
            calls = rows.cache_rows(kv, heads, length + 1, dtype, bool(softcap))
            if calls is None:
                return None
            row = self._row = (asked, kv.k, kv.v, (*calls, rows.cache_addresses(kv)))
        return row[3]

    def advance(self) -> None:
        """Count a token that the kernels of `one_row` have stored."""
        self.length += 1
        assert self.owner.store is not None
        self.owner.store.length = self.length

    def dense(self) -> tuple[Tensor, Tensor]:
        """Return keys [B, H, T, D] and values [B, H, T, Dv] in the model's dtype, copied out."""
        kv, length = self.kv, self.length
        keys = kv.k.transpose(3, 4).flatten(2, 3)[:, :, :length]
        values = kv.v[:, :, :length]
        if kv.k_scale is not None and kv.v_scale is not None:
            keys = keys * kv.k_scale[:, :, :length, None]
            values = values * kv.v_scale[:, :, :length, None]
        return keys.to(self.dtype), values.to(self.dtype)

    @property
    def keys(self) -> Tensor | None:  # pyright: ignore
        """The dense keys, for readers that know no other layout."""
        return self.dense()[0] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:  # pyright: ignore
        """The dense values."""
        return self.dense()[1] if self.is_initialized else None

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return how many keys a step of `query_length` queries sees, and the first one's position.

        transformers before 5.2 hands the positions themselves.
        """
        positions = isinstance(query_length, Tensor) and query_length.dim() > 0
        count = query_length.shape[0] if positions else query_length
        return self.length + int(count), 0

    def get_seq_length(self) -> int:
        """Return the tokens held."""
        return self.length

    def get_max_length(self) -> int:
        """Return -1: the store grows."""
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget the tokens, keep the memory."""
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last -n tokens; of a positive n (transformers before 5.19), keep the first n."""
        n = int(tokens_to_remove)
        self.length = max(0, self.length + n) if n <= 0 else min(self.length, n)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Bring the rows into the order `beam_idx` [B]."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.is_initialized:
            rows = self.owner.rows(self.index)
            self._select(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._select(indices)

    def _select(self, rows: Tensor) -> None:
        if self.is_initialized:
            self.owner.select(self.index, rows)

    def offload(self) -> None:
        """Nothing to do: the store lies in the CPU's memory."""

    prefetch = offload


class EdgeFormerCache(Cache):
    """Keys and values of a decoder, in the layout that EdgeFormer's attention reads fastest.

    `config` is the model's; `dtype` None keeps the model's, else "fp32", "bf16", "fp16" or "int8" (one
    scale a token and head). With another attention than ours the cache stays right: it hands out dense
    copies.

    Raises UnsupportedError for an encoder-decoder's configuration.
    """

    layers: list[EdgeFormerLayer]  # pyright: ignore

    def __init__(self, config: Any, dtype: str | None = None) -> None:
        text = config.get_text_config(decoder=True)
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedError("EdgeFormerCache holds a decoder's keys; this is an encoder-decoder")
        self.handles = text._attn_implementation == NAME
        self.kind = dtype
        self.store: KVCache | None = None
        self.aligned = False  # whether the heads are what the kernels read
        self.unreadable = torch.full((), torch.nan)
        self._tables: dict[int, tuple[Tensor, Tensor, Tensor, tuple[int, int, int]]] = {}
        layers = [EdgeFormerLayer(self, i) for i in range(text.num_hidden_layers)]
        super().__init__(layers=layers)  # pyright: ignore[reportArgumentType]

    def tables(self, cos: Tensor, sin: Tensor) -> tuple[int, int, int] | None:
        """Return addresses of the fp32 tables of rope for one position and the elements that it rotates.

        cos and sin [1, 1, rotary_dim] are what transformers hands to every layer of a step: two equal halves.
        """
        held = self._tables.get(id(cos))
        if held is None or held[0] is not cos or held[1] is not sin:
            shape = cos.shape
            if len(shape) != 3 or shape[0] != 1 or shape[1] != 1 or sin.shape != shape or shape[2] % 2:
                return None
            if len(self._tables) > 3:
                self._tables.clear()
            fp32 = torch.cat([cos[0, 0, : shape[2] // 2], sin[0, 0, : shape[2] // 2]]).float()
            first = fp32.data_ptr()
            held = self._tables[id(cos)] = (cos, sin, fp32, (first, first + 2 * shape[2], shape[2]))
        return held[3]

    def reserve(self, tokens: int, key: Tensor, value: Tensor) -> None:
        """Make room for `tokens` tokens; the store at least doubles when it grows."""
        if self.store is not None and tokens <= self.store.capacity:
            return
        old = self.store
        capacity = max(tokens, _FIRST_CAPACITY if old is None else 2 * old.capacity)
        kind = self.kind or _OF_DTYPE.get(key.dtype)
        if kind is None:
            raise UnsupportedError(f"EdgeFormerCache: keys of {key.dtype}; use a float type")
        self.aligned = key.shape[3] % 16 == 0 and value.shape[3] % 16 == 0
        if self.unreadable.dtype != key.dtype:
            self.unreadable = self.unreadable.to(key.dtype)
        rows, heads = key.shape[:2] if old is None else old.layer(0).k.shape[:2]
        new = KVCache(len(self.layers), rows, heads, key.shape[3], capacity, kind, value.shape[3])
        if old is not None:
            new.length = old.length
            for i in range(len(self.layers)):
                _copy(old.layer(i), new.layer(i))
        self.store = new

    def rows(self, index: int) -> int:
        """Return the batch size that a layer holds."""
        return 0 if self.store is None else self.store.layer(index).k.shape[0]

    def select(self, index: int, rows: Tensor) -> None:
        """Replace a layer's rows by a selection of them."""
        assert self.store is not None
        kv = self.store.layer(index)
        for name in ("k", "v", "k_scale", "v_scale"):
            tensor = getattr(kv, name)
            if tensor is not None:
                setattr(kv, name, tensor.index_select(0, rows))

    @property
    def nbytes(self) -> int:
        """Bytes of the store."""
        return 0 if self.store is None else self.store.nbytes


def _copy(old: LayerKV, new: LayerKV) -> None:
    blocks, slots = old.k.shape[2], old.v.shape[2]
    if new.k.shape[0] != old.k.shape[0]:  # this layer's rows were repeated or selected
        shape = (old.k.shape[0], *new.k.shape[1:])
        new.k = new.k.new_empty(shape)
        new.v = new.v.new_empty((old.v.shape[0], *new.v.shape[1:]))
        if new.k_scale is not None and new.v_scale is not None:
            new.k_scale = new.k_scale.new_empty((old.k.shape[0], *new.k_scale.shape[1:]))
            new.v_scale = new.v_scale.new_empty((old.k.shape[0], *new.v_scale.shape[1:]))
    new.k[:, :, :blocks] = old.k
    new.v[:, :, :slots] = old.v
    if old.k_scale is not None and old.v_scale is not None and new.k_scale is not None:
        assert new.v_scale is not None
        new.k_scale[:, :, :slots] = old.k_scale
        new.v_scale[:, :, :slots] = old.v_scale
    assert KEY_BLOCK * blocks <= new.v.shape[2]


def prepare_cache(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Let `generate` make its cache, and put ours in the place of a fresh dynamic one."""
    options = [made for made in (*args, *kwargs.values()) if isinstance(made, dict)]
    without = [made for made in options if made.get("past_key_values") is None]  # else the caller's own cache
    result = type(model)._prepare_cache_for_generation(model, *args, **kwargs)
    for made in without:
        cache = made.get("past_key_values")
        fresh = type(cache) is DynamicCache
        absent = cache is None and _makes_its_own(model, args[0] if args else None)
        if (absent or (fresh and cache is not None and not cache.offloading)) and uniform(model.config):
            made["past_key_values"] = EdgeFormerCache(model.config)
    return result


def _makes_its_own(model: Any, generation: Any) -> bool:
    """Whether a model's forward would make a dynamic cache: transformers 5.0 leaves it to that."""
    return (
        getattr(generation, "use_cache", False) is not False
        and getattr(generation, "cache_implementation", "") is None
        and model._supports_default_dynamic_cache()
    )


def uniform(config: Any) -> bool:
    """Whether all layers hold keys and values of one shape, so that one store fits them."""
    text = config.get_text_config(decoder=True)
    plain = {"full_attention", "sliding_attention"}
    types = getattr(text, "layer_types", None) or ["full_attention"]
    odd = ("kv_lora_rank", "num_kv_shared_layers", "attention_chunk_size", "global_head_dim")
    return (
        not getattr(config, "is_encoder_decoder", False)
        and set(types) <= plain
        and not any(getattr(text, name, None) for name in odd)
    )
