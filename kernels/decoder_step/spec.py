"""The whole decode step's problem: embedding, a range of Llama-family layers and the head in one launch."""

from __future__ import annotations

from dataclasses import dataclass

from ..attention.spec import AttentionSpec
from ..quant_matmul.spec import QuantMatmulSpec
from ..quant_matmul.weight_format import WeightFormat

# What the layer table holds of each layer: int64 addresses (0: absent).
LAYER_SLOTS = (
    "attn_norm",
    "qkv",
    "qkv_bias",
    "o",
    "mlp_norm",
    "gate_up",
    "down",
    "k",
    "v",
    "k_scale",
    "v_scale",
)


@dataclass(frozen=True)
class DecoderStepSpec:
    """Embedding, then for every layer attention and gated MLP behind their norms, then norm and head.

    x = embed(ids); x += o(attention(rope(qkv(norm(x))))); x += down(silu(gate) * up); head(norm(x)).

    Weights and caches are arguments bound by handle: a table of int64 addresses, one row a layer; the
    number of layers, rows (batch x tokens), the position and the number of threads are run-time
    arguments. With activation "bfloat16" products are a matrix unit's, with math "bfloat16" (see
    AttentionSpec) attention is, for many rows. Norm weights are fp32, hidden states fp32 [M, hidden]. All
    layers share these formats.
    """

    hidden: int
    intermediate: int
    vocab: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    qkv: WeightFormat
    o: WeightFormat
    gate_up: WeightFormat
    down: WeightFormat
    embed: WeightFormat
    head: WeightFormat
    embed_layout: str
    rotary_dim: int
    rope_interleaved: bool = False
    qkv_bias: bool = False
    kv_dtype: str = "bfloat16"
    mask: str = "causal"
    activation: str = "int8"
    math: str = "float32"

    def key(self) -> str:
        """One line that names the problem."""
        heads = f"{self.num_heads}/{self.num_kv_heads}x{self.head_dim}"
        formats = " ".join(
            f.key() for f in (self.qkv, self.o, self.gate_up, self.down, self.embed, self.head)
        )
        flags = f"{'interleaved ' if self.rope_interleaved else ''}{'bias ' if self.qkv_bias else ''}"
        return (
            f"{self.hidden} {self.intermediate} {self.vocab} {heads} rotary={self.rotary_dim} "
            f"eps={self.eps!r} {formats} {self.embed_layout} {flags}"
            f"{self.kv_dtype} {self.mask} {self.activation} {self.math}"
        )

    @property
    def qkv_columns(self) -> int:
        """Columns of the fused query, key and value product."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def attention_columns(self) -> int:
        """Columns of the attention's output."""
        return self.num_heads * self.head_dim

    def matmul(self, name: str) -> QuantMatmulSpec:
        """Return the problem of one of the step's products: qkv, o, gate_up, down or head."""
        d, f = self.hidden, self.intermediate
        make = lambda n, k, fmt, **more: QuantMatmulSpec(n, k, fmt, self.activation, **more)  # noqa: E731
        return {
            "qkv": lambda: make(self.qkv_columns, d, self.qkv, bias=self.qkv_bias),
            "o": lambda: make(d, self.attention_columns, self.o, residual=True),
            "gate_up": lambda: make(2 * f, d, self.gate_up, epilogue="silu_pair"),
            "down": lambda: make(d, f, self.down, residual=True),
            "head": lambda: make(self.vocab, d, self.head),
        }[name]()

    def attention(self) -> AttentionSpec:
        """Return the attention's problem over the blocked cache."""
        return AttentionSpec(
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.head_dim,
            "float32",
            self.kv_dtype,
            self.mask,
            "blocked",
            math=self.math,
        )
