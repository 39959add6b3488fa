"""The CPU form's tuning space: tile of queries and keys, chunk of keys, when decode gives way to prefill."""

from __future__ import annotations

from ...compiler.space import Axis, Constraint, Space
from ...compiler.target import Target
from .spec import AttentionSpec

DECODE, FEW, PREFILL = "decode", "few", "prefill"  # phases; in FEW the switch between the others decides
_ROWS = (96, 48, 192)  # query rows (queries x heads of a group) that share a tile of K and V
_KEYS = (128, 64, 256)  # keys of a tile
_ROWS_MATRIX = (384, 192, 96)  # larger tiles share the conversion of K and V, and decays of the output
_KEYS_MATRIX = (256, 128, 512)
_DECODE_ROWS = (8, 4, 16)  # up to so many queries run as decode
_CHUNK = (256, 128, 512, 1024)  # keys of a decode chunk in long contexts
_PREFETCH = (True, False)  # decode: V while K is read, K of the next chunk while V is read


_MATRIX_FROM = 9  # queries from which prefill runs; fewer split the keys over the threads


def fastest_math(queries: int, kv_dtype: str, target: Target) -> str:
    """Return the arithmetic that "auto" stands for: bf16 where a matrix unit has enough queries."""
    if target.isa == "amx" and queries >= _MATRIX_FROM and kv_dtype in ("bfloat16", "int8"):
        return "bfloat16"
    return "float32"


def space(spec: AttentionSpec, target: Target) -> Space:
    """Return every configuration whose tiles fit half of L2, the default first."""
    matrix = spec.math == "bfloat16"
    rows, keys = (_ROWS_MATRIX, _KEYS_MATRIX) if matrix else (_ROWS, _KEYS)
    most = max(target.l2 // 2, tile_bytes(spec, min(rows), min(keys)))
    fits = lambda row, key: tile_bytes(spec, row, key) <= most  # noqa: E731
    if not fits(rows[0], keys[0]):  # the largest tile that does comes first
        sizes = [(tile_bytes(spec, r, k), r, k) for r in rows for k in keys if fits(r, k)]
        _, row, key = max(sizes)
        rows, keys = (row, *(r for r in rows if r != row)), (key, *(k for k in keys if k != key))
    few = ("none",) if matrix else (FEW,)
    axes = (
        Axis("block_q", rows, (PREFILL, *few)),
        Axis("block_k", keys, (PREFILL, *few)),
        Axis("decode_rows", _DECODE_ROWS, few),
        Axis("chunk", _CHUNK, (DECODE, *few)),
        Axis("prefetch", _PREFETCH, (DECODE, *few)),
    )
    return Space(axes, (Constraint("tiles fit half of L2", lambda c: fits(c["block_q"], c["block_k"])),))


def tile_bytes(spec: AttentionSpec, rows: int, keys: int) -> int:
    """Return the fp32 bytes of a query tile with its output and of a tile of K and V."""
    return 4 * (rows + keys) * (spec.head_dim + spec.v_head_dim)
