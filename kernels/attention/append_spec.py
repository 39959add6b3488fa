"""The problem of appending keys and values to the blocked cache."""

from __future__ import annotations

from dataclasses import dataclass

from ...compiler.errors import UnsupportedError
from .spec import FLOAT_TYPES, KV_TYPES


@dataclass(frozen=True)
class AppendSpec:
    """k [B, Hkv, T, D] and v [B, Hkv, T, Dv] (`dtype`) into a blocked cache (`kv_dtype`) from a position on.

    int8: code = round-half-even(x * 127 / absmax) and scale = absmax / 127, for each token and head; a
    token with NaN or Inf gets a NaN scale.
    """

    head_dim: int
    v_head_dim: int
    dtype: str = "float32"
    kv_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype not in FLOAT_TYPES or self.kv_dtype not in KV_TYPES:
            raise UnsupportedError(f"a KV cache cannot store {self.dtype} as {self.kv_dtype}")

    def key(self) -> str:
        """One line that names the problem."""
        return f"{self.head_dim}:{self.v_head_dim} {self.dtype} {self.kv_dtype}"
