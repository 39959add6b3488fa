"""The attention problem: out = softmax(mask(softcap(scale * q @ k.T) + bias)) @ v, by groups of heads."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...compiler.errors import UnsupportedError

MASKS = ("none", "causal", "causal_lengths", "additive", "block", "prefix")
FLOAT_TYPES = ("float32", "bfloat16", "float16")
KV_TYPES = (*FLOAT_TYPES, "int8")
LAYOUTS = ("strided", "blocked", "paged", "latent", "vectors")
KEY_BLOCK = 16  # tokens of a block of the blocked layout: one 512-bit vector of scores
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True)
class AttentionSpec:
    """q [B, Hq, Tq, D], k [B, Hkv, Tk, D], v [B, Hkv, Tk, Dv], out [B, Hq, Tq, Dv] in q's dtype.

    B, Tq, Tk, all strides and the values of `window`, `softcap`, `scale` and `q_offset` are run-time
    arguments; here stands only whether they are used. Query i stands at position p = q_offset + i
    (default Tk - Tq + i) and sees key j if the mask and the window allow it:

    * "none": every j; "causal": j <= p; "causal_lengths": also j >= Tk - lengths[b] (left padding);
    * "prefix": j <= p or j < prefix[b]; "additive": every j, `bias` [B|1, Hq|1, Tq, Tk] is added;
    * "block": bool `block_mask` [B|1, Hq|1, ceil(Tq/block), ceil(Tk/block)], True is visible;
    * window w > 0: |p - j| < w as well.

    A score is scale * q.k, then softcap * tanh(score / softcap), then bias. A key that is not seen has no
    influence, whatever it holds. `sinks` [Hq] adds exp(sink) to a row's denominator. A row that sees
    nothing gives out 0 and lse -inf. int8 k and v have an fp32 scale per token and head. lse is fp32
    [B, Hq, Tq], the natural logarithm of the denominator.

    `math` "bfloat16" rounds k, v, the softmax weights, and q times scale * log2(e) (scale / softcap with a
    softcap) to bf16; sums are fp32.

    Layouts: "strided" takes any strides with last stride 1; "blocked" is k [B, Hkv, cap/16, D, 16] and v
    [B, Hkv, cap, Dv]; "paged" is a table of such blocks; "latent" one latent per token, v its first Dv;
    "vectors" (a device's) is k [B, Hkv, cap/32, D/E, 32, E] and v [B, Hkv, cap, Dv], E elements of 16 bytes.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    q_dtype: str = "float32"
    kv_dtype: str = "float32"
    mask: str = "causal"
    layout: str = "strided"
    window: bool = False
    softcap: bool = False
    sinks: bool = False
    lse: bool = False
    bias_dtype: str = "float32"
    block: int = field(default=0)
    math: str = "float32"

    def __post_init__(self) -> None:
        if self.mask not in MASKS:
            raise UnsupportedError(f"attention mask {self.mask!r} is unknown; use one of {', '.join(MASKS)}")
        if self.layout not in LAYOUTS:
            raise UnsupportedError(f"KV layout {self.layout!r} is unknown; use one of {', '.join(LAYOUTS)}")
        if self.q_dtype not in FLOAT_TYPES or self.bias_dtype not in FLOAT_TYPES:
            raise UnsupportedError(f"queries and bias must be {', '.join(FLOAT_TYPES)}, not {self.q_dtype}")
        if self.kv_dtype not in KV_TYPES:
            raise UnsupportedError(f"keys and values must be {', '.join(KV_TYPES)}, not {self.kv_dtype}")
        if min(self.num_heads, self.num_kv_heads, self.head_dim, self.v_head_dim) < 1:
            raise UnsupportedError("attention needs at least one head and one element a head")
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key-value heads evenly"
            )
        if self.math not in ("float32", "bfloat16"):
            raise UnsupportedError(f"attention math {self.math!r} is unknown; use float32 or bfloat16")
        if self.mask == "block" and self.block < 1:
            raise UnsupportedError("a block mask needs the size of its blocks")

    def key(self) -> str:
        """One line that names the problem."""
        flags = [name for name in ("window", "softcap", "sinks", "lse") if getattr(self, name)]
        if self.mask == "additive":
            flags.append(f"bias={self.bias_dtype}")
        if self.mask == "block":
            flags.append(f"block={self.block}")
        if self.math != "float32":
            flags.append(f"math={self.math}")
        shape = f"{self.num_heads}/{self.num_kv_heads}x{self.head_dim}"
        if self.v_head_dim != self.head_dim:
            shape += f":{self.v_head_dim}"
        return " ".join([shape, self.q_dtype, self.kv_dtype, self.layout, self.mask, *flags])

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def tolerance(self) -> float:
        """The relative error (L2) that a form may have: the rounding of the output's and the math's type."""
        own = {"float32": 1e-5, "bfloat16": 4e-3, "float16": 5e-4}
        return max(own[self.q_dtype], own[self.math])

    def operations(self, pairs: int) -> int:
        """Multiplications and additions for `pairs` of a query and a key that it sees, over all heads."""
        return 2 * pairs * self.num_heads * (self.head_dim + self.v_head_dim)

    def kv_bytes(self, keys: int) -> int:
        """Bytes of k and v that `keys` tokens of one sequence take, scales included."""
        element = _BYTES[self.kv_dtype]
        scales = 8 if self.kv_dtype == "int8" else 0
        return keys * self.num_kv_heads * (element * (self.head_dim + self.v_head_dim) + scales)


def causal_pairs(tq: int, tk: int, window: int = 0) -> int:
    """Return how many (query, key) pairs a causal mask with default offset leaves."""
    total = 0
    for p in range(tk - tq, tk):
        total += max(0, min(p + 1, window) if window else p + 1)
    return total


def examples() -> list[AttentionSpec]:
    """Return example problems: small and large models, each KV type, every mask that a form delivers."""
    return [
        AttentionSpec(9, 3, 64, 64, kv_dtype="bfloat16", layout="blocked"),
        AttentionSpec(32, 8, 64, 64, kv_dtype="int8", layout="blocked", mask="causal_lengths"),
        AttentionSpec(8, 8, 128, 128, q_dtype="bfloat16", kv_dtype="bfloat16", mask="none"),
        AttentionSpec(8, 1, 256, 256, window=True, softcap=True),
        AttentionSpec(12, 12, 80, 80, mask="additive"),
    ]
