"""The KV cache in the blocked layout: keys in blocks of 16 tokens, so that scores need no horizontal sums."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compiler.errors import CapacityError, UnsupportedError
from ..compiler.target import available_memory
from ..kernels.attention.append import OPERATOR as APPEND
from ..kernels.attention.append import AppendSpec
from ..kernels.attention.spec import KEY_BLOCK
from ..kernels.shared.memory import Arena
from . import dispatch

_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.int8: "int8"}


@dataclass
class LayerKV:
    """One layer's keys and values.

    k is [B, Hkv, capacity/16, D, 16], v is [B, Hkv, capacity, Dv]; int8 ones have fp32 scales
    [B, Hkv, capacity] (value = code * scale, symmetric, one per token and head). Slots that were never
    written hold anything.
    """

    cache: KVCache
    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.v.shape[2]

    @property
    def dtype(self) -> str:
        """The stored type as specs name it."""
        return _NAMES[self.k.dtype]

    def append(self, k: Tensor, v: Tensor, position: int) -> None:
        """Store k [B, Hkv, T, D] and v [B, Hkv, T, Dv] (any float type and strides) at `position`.

        Raises CapacityError when they run past the capacity, or would leave a gap before them.
        """
        tokens = k.shape[2]
        end = position + tokens
        if end > self.cache.capacity:
            raise CapacityError(
                f"{end} tokens do not fit a KV cache of {self.cache.capacity}; "
                "shorten the prompt or make the cache larger (context=...)"
            )
        if position > self.cache.length or position < 0:
            held = self.cache.length
            raise CapacityError(f"position {position} leaves a gap: the cache holds {held} tokens")
        b, h, _, d, _ = self.k.shape
        if k.shape != (b, h, tokens, d) or v.shape != (b, h, tokens, self.v.shape[3]):
            raise UnsupportedError(
                f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit a cache of batch {b}, {h} heads x {d}"
            )
        if tokens:
            self._store(k, v, position)
        self.cache.length = end

    def _store(self, k: Tensor, v: Tensor, position: int) -> None:
        if k.dtype != v.dtype:
            v = v.to(k.dtype)
        k = k if k.stride(3) == 1 else k.contiguous()
        v = v if v.stride(3) == 1 else v.contiguous()
        key = (k.dtype, dispatch.generation())
        call = self.cache.bound_calls.get(key)
        if call is None:
            spec = AppendSpec(self.k.shape[3], self.v.shape[3], _NAMES[k.dtype], self.dtype)
            call = self.cache.bound_calls[key] = dispatch.bound(APPEND, spec)
        call(k, v, self.k, self.v, self.k_scale, self.v_scale, position)


class KVCache:
    """Keys and values of `layers` layers for `batch` sequences of up to `capacity` tokens.

    `dtype` is "bf16", "fp32", "fp16" or "int8". `length` is the number of tokens held; all sequences of a
    batch have the same (shorter ones are padded on the left). Raises CapacityError when it does not fit
    the memory that is free.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: str = "bf16",
        v_head_dim: int | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise UnsupportedError(f"KV type {dtype!r} is unknown; use one of {', '.join(_DTYPES)}")
        v_head_dim = v_head_dim or head_dim
        needed = KVCache.bytes_needed(layers, batch, kv_heads, head_dim, capacity, dtype, v_head_dim)
        free = available_memory()
        if needed > free:
            raise CapacityError(
                f"a KV cache of {capacity} tokens ({dtype}) needs {needed / 1e6:.0f} MB "
                f"and {free / 1e6:.0f} MB are free; use a smaller context or kv='int8'"
            )
        self.dtype = dtype
        self.capacity = capacity
        self.length = 0
        self.bound_calls: dict[object, Callable[..., None]] = {}
        slots = _slots(capacity)
        kind = _DTYPES[dtype]
        self._layers = []
        arena = Arena()

        def empty(*shape: int, dtype: torch.dtype = kind) -> Tensor:
            nbytes = math.prod(shape) * dtype.itemsize
            return arena.take(nbytes).view(dtype).view(shape)

        for _ in range(layers):
            k = empty(batch, kv_heads, slots // KEY_BLOCK, head_dim, KEY_BLOCK)
            v = empty(batch, kv_heads, slots, v_head_dim)
            scaled = dtype == "int8"
            scales = [
                empty(batch, kv_heads, slots, dtype=torch.float32) if scaled else None for _ in range(2)
            ]
            self._layers.append(LayerKV(self, k, v, *scales))

    @staticmethod
    def bytes_needed(
        layers: int,
        batch: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: str = "bf16",
        v_head_dim: int | None = None,
    ) -> int:
        """Return the bytes that such a cache takes."""
        element = torch.empty((), dtype=_DTYPES[dtype]).element_size()
        token = element * (head_dim + (v_head_dim or head_dim)) + (8 if dtype == "int8" else 0)
        return layers * batch * kv_heads * _slots(capacity) * token

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(t.numel() * t.element_size() for layer in self._layers for t in _tensors(layer))

    @property
    def batch(self) -> int:
        """Sequences held."""
        return self._layers[0].k.shape[0] if self._layers else 0

    def layer(self, i: int) -> LayerKV:
        """Return layer `i`'s keys and values."""
        return self._layers[i]

    def clone(self) -> KVCache:
        """Return an independent copy that holds the same tokens."""
        copy = KVCache.__new__(KVCache)
        copy.dtype, copy.capacity, copy.length = self.dtype, self.capacity, self.length
        copy.bound_calls = self.bound_calls
        copy._layers = []
        for layer in self._layers:
            scales = [None if t is None else t.clone() for t in (layer.k_scale, layer.v_scale)]
            copy._layers.append(LayerKV(copy, layer.k.clone(), layer.v.clone(), *scales))
        return copy

    def take_tokens(self, other: KVCache) -> None:
        """Copy the tokens of a smaller cache of the same layers, rows and types into this one."""
        for i, old in enumerate(other._layers):
            for name in ("k", "v", "k_scale", "v_scale"):
                held, room = getattr(old, name), getattr(self.layer(i), name)
                if held is not None:  # [B, H, blocks or slots, ...]
                    room[:, :, : held.shape[2]] = held
        self.length = other.length

    def trim(self, length: int) -> None:
        """Keep the first `length` tokens. Raises CapacityError when there are fewer."""
        if not 0 <= length <= self.length:
            raise CapacityError(f"cannot keep {length} tokens of a cache that holds {self.length}")
        self.length = length

    def rollback(self, tokens: int) -> None:
        """Drop the last `tokens` tokens. Raises CapacityError when there are fewer."""
        self.trim(self.length - tokens)


def select_rows(cache: KVCache, rows: Tensor) -> KVCache:
    """Return a new cache with the sequences `rows` int64 [B] of this one (for beams), with its tokens."""
    picked = copy.copy(cache)
    picked._layers = []
    for layer in cache._layers:
        tensors = [None if t is None else t.index_select(0, rows) for t in _all(layer)]
        picked._layers.append(LayerKV(picked, *tensors))  # pyright: ignore[reportArgumentType]
    return picked


def _all(layer: LayerKV) -> tuple[Tensor | None, ...]:
    return (layer.k, layer.v, layer.k_scale, layer.v_scale)


def _slots(capacity: int) -> int:
    """Whole blocks, and at least one."""
    return max(1, -(-capacity // KEY_BLOCK)) * KEY_BLOCK


def _tensors(layer: LayerKV) -> list[Tensor]:
    return [t for t in (layer.k, layer.v, layer.k_scale, layer.v_scale) if t is not None]
