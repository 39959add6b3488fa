"""The `vectors` layout of a device's KV cache: 16 bytes of one key's elements beside the next key's."""

from __future__ import annotations

import torch
from torch import Tensor

KEYS = 32  # keys of a block
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


def elements(kv_dtype: str) -> int:
    """Return the elements of a vector of 16 bytes."""
    return 16 // BYTES[kv_dtype]


def slots_of(capacity: int) -> int:
    """Return the slots of a cache for `capacity` tokens: whole blocks."""
    return max(1, -(-capacity // KEYS)) * KEYS


def dense_keys(k: Tensor) -> Tensor:
    """Return [B, Hkv, slots, D] of keys [B, Hkv, slots / 32, D / E, 32, E]."""
    b, h, blocks, chunks, keys, e = k.shape
    return k.transpose(3, 4).reshape(b, h, blocks * keys, chunks * e)


def lay_keys(k: Tensor, kv_dtype: str) -> Tensor:
    """Lay keys [B, Hkv, slots, D] out as the inverse of `dense_keys`."""
    b, h, slots, dim = k.shape
    e = elements(kv_dtype)
    return k.view(b, h, slots // KEYS, KEYS, dim // e, e).transpose(3, 4).contiguous()


def torch_dtype(kv_dtype: str) -> torch.dtype:
    """Return the torch dtype of a cache's elements."""
    return getattr(torch, kv_dtype)
