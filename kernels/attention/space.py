"""The CPU form's tuning space: tile of queries and keys, chunk of keys, when decode gives way to prefill."""

from __future__ import annotations

import itertools
from typing import Any

from ...compiler.target import Target
from .spec import AttentionSpec

_ROWS = [96, 48, 192]  # query rows (queries x heads of a group) that share a tile of K and V
_KEYS = [128, 64, 256]  # keys of a tile
_DECODE_ROWS = [8, 4, 16]  # up to so many queries run as decode
_CHUNK = [256, 128, 512]  # keys of a decode chunk in long contexts
_PREFETCH = [True, False]  # decode: V while K is read, K of the next chunk while V is read


_MATRIX_FROM = 9  # queries from which prefill runs; fewer split the keys over the threads


def fastest_math(queries: int, kv_dtype: str, target: Target) -> str:
    """Return the arithmetic that "auto" stands for: bf16 where a matrix unit has enough queries."""
    if target.isa == "amx" and queries >= _MATRIX_FROM and kv_dtype in ("bfloat16", "int8"):
        return "bfloat16"
    return "float32"


def space(spec: AttentionSpec, target: Target) -> list[dict[str, Any]]:
    """Return every configuration whose tiles fit half of L2, the default first."""
    if spec.math == "bfloat16":  # larger tiles share the conversion of K and V, and decays of the output
        rows, keys = [192, 96, 384], [256, 128, 512]
    else:
        rows, keys = _ROWS, _KEYS
    names = ("block_q", "block_k", "decode_rows", "chunk", "prefetch")
    most = max(target.l2 // 2, tile_bytes(spec, min(rows), min(keys)))
    return [
        dict(zip(names, values))
        for values in itertools.product(rows, keys, _DECODE_ROWS, _CHUNK, _PREFETCH)
        if tile_bytes(spec, values[0], values[1]) <= most
    ]


def tile_bytes(spec: AttentionSpec, rows: int, keys: int) -> int:
    """Return the fp32 bytes of a query tile with its output and of a tile of K and V."""
    return 4 * (rows + keys) * (spec.head_dim + spec.v_head_dim)
