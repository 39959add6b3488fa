"""What a decoder looks like: every number that the layers need, and nothing about weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..compiler.errors import FormatError, UnsupportedError
from .rope import Rope

ACTIVATIONS = ("silu", "gelu_tanh")
MAX_LAYERS = 4096  # more are a damaged file, and would take memory before anything is checked


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder of the families in ``load/hf_config.py`` and ``load/gguf_config.py``.

    Queries and keys are half-split (a rotary pair is ``(i, i + rotary_dim / 2)``) unless
    ``rope_interleaved``; the GGUF loader permutes rows so that they always are. Norms are RMSNorms whose
    weights are used as they are: loaders add the 1 that Gemma's checkpoints leave out.

    ``windows`` holds for every layer the keys that a query sees (itself and those before it), 0: all.
    ``local_rope`` is that of layers with a window, where it differs. ``attention_scale`` multiplies scores,
    None: head_dim ** -0.5; a softcap c > 0 turns a score (or logit) s into c * tanh(s / c).
    ``post_norms``: what attention and MLP add passes another norm first (Gemma). ``qk_norm``: each head's
    query and key pass a norm before they are rotated.

    Raises:
        FormatError: a number makes no sense (zero, or heads that do not divide).
        UnsupportedError: the numbers are valid but no layer implements them.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    rope: Rope = field(default_factory=Rope)
    local_rope: Rope | None = None
    rotary_dim: int | None = None  # None: the whole head
    rope_interleaved: bool = False
    windows: tuple[int, ...] = ()  # (): no layer has one
    norm_eps: float = 1e-5
    qk_norm: bool = False
    post_norms: bool = False
    activation: str = "silu"  # of the gate
    attention_scale: float | None = None
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    attention_bias: bool = False  # of queries, keys and values
    o_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    architecture: str = "llama"

    def __post_init__(self) -> None:
        counts = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
                  "num_kv_heads", "head_dim", "max_context")  # fmt: skip
        for name in counts:
            if getattr(self, name) < 1:
                raise FormatError(f"{name} is {getattr(self, name)}; it must be at least 1")
        check_layers(self.num_layers)
        if self.num_heads % self.num_kv_heads:
            raise FormatError(
                f"{self.num_heads} query heads do not divide among {self.num_kv_heads} key heads"
            )
        if not 0 < self.norm_eps < 1:
            raise FormatError(f"norm_eps {self.norm_eps} must be positive and below 1")
        for name in ("attention_softcap", "logit_softcap"):
            if not 0 <= getattr(self, name) < math.inf:
                raise FormatError(f"{name} is {getattr(self, name)}; it must be positive, or 0 for none")
        for name in ("scale", "embedding_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise FormatError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.activation not in ACTIVATIONS:
            raise UnsupportedError(
                f"the activation {self.activation!r} is not supported ({', '.join(ACTIVATIONS)} are)"
            )
        if self.windows and (len(self.windows) != self.num_layers or min(self.windows) < 0):
            raise FormatError(f"{len(self.windows)} windows for {self.num_layers} layers: {self.windows[:8]}")
        rotary = self.rotary
        if rotary % 2 or not 0 < rotary <= self.head_dim:
            raise UnsupportedError(f"rotary_dim {rotary} must be even and at most head_dim {self.head_dim}")
        for rope in self.ropes:
            rope.check_size(rotary)

    @property
    def rotary(self) -> int:
        """How many leading elements of a head are rotated."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def scale(self) -> float:
        """What multiplies a score."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The kinds of rotary tables: of layers that see everything, then of layers with a window."""
        return (self.rope,) if self.local_rope is None else (self.rope, self.local_rope)

    def window(self, layer: int) -> int:
        """How many keys a query of this layer sees; 0: all."""
        return self.windows[layer] if self.windows else 0

    def rope_kind(self, layer: int) -> int:
        """Which of ``ropes`` turns this layer's heads."""
        return 1 if self.local_rope is not None and self.window(layer) else 0

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Name -> (N, K) of every linear weight, in the order of the decoder."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        d, f = self.hidden_size, self.intermediate_size
        shapes = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q), "gate": (f, d), "up": (f, d),
                  "down": (d, f)}  # fmt: skip
        table = {"embed": (self.vocab_size, d)}
        for layer in range(self.num_layers):
            table |= {f"layers.{layer}.{part}": shape for part, shape in shapes.items()}
        return table if self.tie_embeddings else {**table, "head": (self.vocab_size, d)}

    def vectors(self) -> dict[str, int]:
        """Name -> size of every norm weight and bias."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        d, f = self.hidden_size, self.intermediate_size
        sizes = {"attn_norm": d, "mlp_norm": d}
        if self.post_norms:
            sizes |= {"attn_post_norm": d, "mlp_post_norm": d}
        if self.qk_norm:
            sizes |= {"q_norm": self.head_dim, "k_norm": self.head_dim}
        if self.attention_bias:
            sizes |= {"q_bias": q, "k_bias": kv, "v_bias": kv}
        if self.o_bias:
            sizes |= {"o_bias": d}
        if self.mlp_bias:
            sizes |= {"gate_bias": f, "up_bias": f, "down_bias": d}
        table = {f"layers.{i}.{part}": size for i in range(self.num_layers) for part, size in sizes.items()}
        return {**table, "norm": d}


def check_layers(count: int) -> None:
    """Raise FormatError for a number of layers that no model has."""
    if not 1 <= count <= MAX_LAYERS:
        raise FormatError(f"the model is said to have {count} layers; 1 to {MAX_LAYERS} are believed")
