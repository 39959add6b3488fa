"""The whole decode step's problem: embedding, a range of layers and the head in one launch."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..attention.spec import AttentionSpec
from ..quant_matmul.spec import QuantMatmulSpec
from ..quant_matmul.weight_format import WeightFormat

LAYER_WEIGHTS = ("qkv", "values", "o", "gate_up", "down")
LAYER_VECTORS = (
    "attn_norm", "q_norm", "k_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm",
    "qkv_bias", "values_bias", "o_bias", "gate_up_bias", "down_bias",
)  # fmt: skip
LAYER_CACHES = ("k", "v", "k_scale", "v_scale")
# Keys that a query sees, which of the rotary tables turns its heads, which of the spec's formats it has.
LAYER_NUMBERS = ("window", "rope", "kind")
# What the layer table holds of each layer, int64 each: addresses (0: absent), then numbers.
LAYER_SLOTS = (*LAYER_WEIGHTS, *LAYER_VECTORS, *LAYER_CACHES, *LAYER_NUMBERS)


@dataclass(frozen=True)
class LayerFormats:
    """The formats of one kind of layer's weights.

    `values` is the format of the value rows where it is another than that of queries and keys: then `qkv` is
    queries and keys alone. None: all three are one weight.
    """

    qkv: WeightFormat
    o: WeightFormat
    gate_up: WeightFormat
    down: WeightFormat
    values: WeightFormat | None = None

    def all(self) -> tuple[WeightFormat, ...]:
        """Return the formats."""
        found = (self.qkv, self.o, self.gate_up, self.down)
        return found if self.values is None else (*found, self.values)

    def key(self) -> str:
        """One line that names them."""
        return " ".join(f.key() for f in self.all())


@dataclass(frozen=True)
class DecoderStepSpec:
    """Embedding, then for every layer attention and gated MLP behind their norms, then norm and head.

    x = embed(ids) * embedding_factor; x += o(attention(rope(qkv(norm(x))))); x += down(act(gate) * up);
    softcap(head(norm(x))). With `qk_norm` every head of q and k passes an RMSNorm before rope; with
    `post_norms` what o and down give passes one before it is added. `attention_scale` 0 is head_dim ** -0.5;
    softcaps as in AttentionSpec and QuantMatmulSpec, 0: none. With `window` each layer's is in the table.

    Weights and caches are arguments bound by handle: a table of int64 addresses, one row a layer; the
    number of layers, rows (batch x tokens), the position and the number of threads are run-time
    arguments. With activation "bfloat16" products are a matrix unit's, with math "bfloat16" (see
    AttentionSpec) attention is, for many rows. Norm weights are fp32, hidden states fp32 [M, hidden].
    `layers` are the kinds of layers that there are; the table says which one each is.
    """

    hidden: int
    intermediate: int
    vocab: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    layers: tuple[LayerFormats, ...]
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
    gate: str = "silu"
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    window: bool = False
    attention_scale: float = 0.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    embedding_factor: float = 1.0

    def key(self) -> str:
        """One line that names the problem."""
        heads = f"{self.num_heads}/{self.num_kv_heads}x{self.head_dim}"
        kinds = " | ".join(kind.key() for kind in self.layers)
        formats = f"{kinds} {self.embed.key()} {self.head.key()}"
        flags = f"{'interleaved ' if self.rope_interleaved else ''}{'bias ' if self.qkv_bias else ''}"
        return (
            f"{self.hidden} {self.intermediate} {self.vocab} {heads} rotary={self.rotary_dim} "
            f"eps={self.eps!r} {formats} {self.embed_layout} {flags}"
            f"{self.kv_dtype} {self.mask} {self.activation} {self.math}{self._options()}"
        )

    def _options(self) -> str:
        """What differs from a Llama."""
        options = ("gate", "o_bias", "mlp_bias", "qk_norm", "post_norms", "window", "attention_scale",
                   "attention_softcap", "logit_softcap", "embedding_factor")  # fmt: skip
        changed = [f.name for f in fields(self) if f.name in options and getattr(self, f.name) != f.default]
        return "".join(f" {name}={getattr(self, name)!r}" for name in changed)

    @property
    def qkv_columns(self) -> int:
        """Columns of the fused query, key and value product."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def attention_columns(self) -> int:
        """Columns of the attention's output."""
        return self.num_heads * self.head_dim

    @property
    def values_columns(self) -> int:
        """Columns of the values: the last of the fused product's."""
        return self.num_kv_heads * self.head_dim

    def matmul(self, name: str, kind: int = 0) -> QuantMatmulSpec:
        """Return the problem of one of the step's products: head, or a weight of a kind of layer."""
        d, f, plain = self.hidden, self.intermediate, not self.post_norms
        has = self.layers[kind]
        split = self.values_columns if has.values else 0
        values = has.values or has.qkv
        make = lambda n, k, fmt, **more: QuantMatmulSpec(n, k, fmt, self.activation, **more)  # noqa: E731
        return {
            "qkv": lambda: make(self.qkv_columns - split, d, has.qkv, bias=self.qkv_bias),
            "values": lambda: make(self.values_columns, d, values, bias=self.qkv_bias),
            "o": lambda: make(d, self.attention_columns, has.o, bias=self.o_bias, residual=plain),
            "gate_up": lambda: make(2 * f, d, has.gate_up, epilogue=f"{self.gate}_pair", bias=self.mlp_bias),
            "down": lambda: make(d, f, has.down, bias=self.mlp_bias, residual=plain),
            "head": lambda: make(self.vocab, d, self.head, softcap=self.logit_softcap),
        }[name]()

    def products(self) -> list[QuantMatmulSpec]:
        """Return the problems of the products of every kind of layer."""
        return [
            self.matmul(name, kind)
            for kind, formats in enumerate(self.layers)
            for name in LAYER_WEIGHTS
            if name != "values" or formats.values is not None
        ]

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
            window=self.window,
            softcap=bool(self.attention_softcap),
            math=self.math,
        )
