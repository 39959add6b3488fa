"""The problem of multi-head latent attention: one latent a token serves the keys and values of all heads."""

from __future__ import annotations

from dataclasses import dataclass

from ...compiler.errors import UnsupportedError
from ..attention.spec import FLOAT_TYPES, KV_TYPES, AttentionSpec

MODES = ("absorbed", "expanded")
MASKS = ("none", "causal", "causal_lengths")
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
_GROUP = 16  # heads that pass a cached latent together
_EXPANDED_HEADS = 16  # heads whose keys and values exist at one time


@dataclass(frozen=True)
class MlaSpec:
    """out[b, h, t] = sum_j softmax_j(score) * (c_j @ w_uv[h]), DeepSeek-V2 (arXiv 2405.04434).

    score = scale * (q_nope[b, h, t] . (w_uk[h] @ c_j) + q_rope[b, h, t] . r_j), where the cache
    [B, capacity, kv_lora_rank + qk_rope_head_dim] holds c_j (normalised) and r_j (rotated) side by side.
    q_nope [B, H, T, Dn], q_rope [B, H, T, Dr], w_uk [H, Dn, R], w_uv [H, R, Dv], out [B, H, T, Dv] in q's
    dtype. B, T, the number of cached tokens `tk`, strides and the scale (default (Dn + Dr)**-0.5) are
    run-time arguments. Query i stands at position q_offset + i (default tk - T + i); masks "none",
    "causal" and "causal_lengths" (also j >= tk - lengths[b]) as in AttentionSpec. int8 latents have one
    fp32 scale a token.

    Both modes compute the same function. "absorbed" multiplies q by w_uk and the weighted latents by w_uv:
    2R + Dr multiply-adds a head and key, no key or value ever exists (decode). "expanded" makes keys and
    values of every cached token first: Dn + Dr + Dv a head and key, R * (Dn + Dv) a head and token (prefill).
    `math` "bfloat16" rounds the operands of all products to bf16; sums are fp32.
    """

    num_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_dtype: str = "float32"
    cache_dtype: str = "bfloat16"
    weight_dtype: str = "bfloat16"
    mode: str = "absorbed"
    mask: str = "causal"
    lse: bool = False
    math: str = "float32"

    def __post_init__(self) -> None:
        sizes = (self.num_heads, self.kv_lora_rank, self.qk_nope_head_dim, self.qk_rope_head_dim)
        if min(*sizes, self.v_head_dim) < 1:
            raise UnsupportedError(f"latent attention with sizes {sizes} and v_head_dim {self.v_head_dim}")
        if self.q_dtype not in FLOAT_TYPES or self.weight_dtype not in FLOAT_TYPES:
            raise UnsupportedError(f"queries and weights must be {', '.join(FLOAT_TYPES)}")
        if self.cache_dtype not in KV_TYPES:
            raise UnsupportedError(f"latents must be {', '.join(KV_TYPES)}, not {self.cache_dtype}")
        if self.mode not in MODES:
            raise UnsupportedError(f"mode {self.mode!r} is unknown; use one of {', '.join(MODES)}")
        if self.mask not in MASKS:
            raise UnsupportedError(f"mask {self.mask!r} is unknown; use one of {', '.join(MASKS)}")
        if self.math not in ("float32", "bfloat16"):
            raise UnsupportedError(f"math {self.math!r} is unknown; use float32 or bfloat16")

    def key(self) -> str:
        """One line that names the problem."""
        shape = f"{self.num_heads}x{self.qk_nope_head_dim}+{self.qk_rope_head_dim}:{self.v_head_dim}"
        types = f"{self.q_dtype} {self.cache_dtype} {self.weight_dtype}"
        lse = " lse" if self.lse else ""
        return f"{shape} rank={self.kv_lora_rank} {types} {self.mode} {self.mask} math={self.math}{lse}"

    @property
    def latent_dim(self) -> int:
        """Elements that are cached of a token: the latent and its rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def head_dim(self) -> int:
        """Elements of a query, and of an expanded key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def tolerance(self) -> float:
        """The relative error (L2) that a form may have: the rounding of the output's and the math's type."""
        own = {"float32": 1e-5, "bfloat16": 4e-3, "float16": 5e-4}
        return max(own[self.q_dtype], 2 * own[self.math] if self.math == "bfloat16" else 0.0)

    @property
    def heads_at_once(self) -> int:
        """Heads of one pass of the inner attention: a divisor of `num_heads`, at most 16."""
        most = _GROUP if self.mode == "absorbed" else _EXPANDED_HEADS
        return max(h for h in range(1, most + 1) if self.num_heads % h == 0)

    def inner(self) -> AttentionSpec:
        """Return the attention that is left when w_uk and w_uv are applied outside of it."""
        heads = self.heads_at_once
        if self.mode == "absorbed":  # groups of heads read the same latents: a head stride of 0
            return AttentionSpec(
                self.num_heads, self.num_heads // heads, self.latent_dim, self.kv_lora_rank,
                "float32", self.cache_dtype, self.mask, lse=self.lse, math="float32",
            )  # fmt: skip
        kv = "bfloat16" if self.math == "bfloat16" else "float32"
        return AttentionSpec(
            heads, heads, self.head_dim, self.v_head_dim, self.q_dtype, kv, self.mask,
            lse=self.lse, math=self.math,
        )  # fmt: skip

    def operations(self, queries: int, keys: int, pairs: int | None = None) -> int:
        """Multiplications and additions of one sequence: `pairs` (query, key) that see each other."""
        pairs = queries * keys if pairs is None else pairs
        weights = self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)
        if self.mode == "absorbed":
            pair = 2 * self.kv_lora_rank + self.qk_rope_head_dim
            return 2 * self.num_heads * (pairs * pair + queries * weights)
        return 2 * self.num_heads * (pairs * (self.head_dim + self.v_head_dim) + keys * weights)

    def cache_bytes(self, keys: int) -> int:
        """Bytes that `keys` tokens of one sequence take."""
        return keys * (_BYTES[self.cache_dtype] * self.latent_dim + (4 if self.cache_dtype == "int8" else 0))

    def weight_bytes(self) -> int:
        """Bytes of w_uk and w_uv."""
        columns = self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        return columns * self.kv_lora_rank * _BYTES[self.weight_dtype]


def cheaper_mode(spec: MlaSpec, queries: int, keys: int) -> str:
    """Return the mode with fewer operations for so many queries over so many keys of one sequence.

    Absorbed at T = 1 (3.4x the operations of expanded a key at R = 512, but none a cached token); expanded
    from about R (Dn + Dv) / (2 R + Dr - Dn - Dr - Dv) queries on (170 for DeepSeek's sizes).
    """
    weights = spec.kv_lora_rank * (spec.qk_nope_head_dim + spec.v_head_dim)
    absorbed = queries * (keys * (2 * spec.kv_lora_rank + spec.qk_rope_head_dim) + weights)
    expanded = queries * keys * (spec.head_dim + spec.v_head_dim) + keys * weights
    return "absorbed" if absorbed <= expanded else "expanded"


def examples() -> list[MlaSpec]:
    """Return example problems: DeepSeek-V2-Lite and V3 in both modes, a small odd one."""
    return [
        MlaSpec(16, 512, 128, 64, 128, q_dtype="bfloat16"),
        MlaSpec(16, 512, 128, 64, 128, q_dtype="bfloat16", mode="expanded"),
        MlaSpec(128, 512, 128, 64, 128, q_dtype="bfloat16", cache_dtype="int8"),
        MlaSpec(6, 80, 32, 16, 48, mask="causal_lengths", lse=True),
    ]
