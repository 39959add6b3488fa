"""What a decoder looks like: every number that the layers need, and nothing about weights."""

from __future__ import annotations

from dataclasses import dataclass

from ..compiler.errors import FormatError, UnsupportedError


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a Llama-family decoder.

    Queries and keys are half-split (a rotary pair is ``(i, i + rotary_dim / 2)``) unless
    ``rope_interleaved``; the GGUF loader permutes rows so that they always are.
    ``rope_scale`` divides positions (linear scaling); ``rope_factors`` divide each frequency (Llama 3).

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
    rope_theta: float = 10000.0
    rotary_dim: int | None = None  # None: the whole head
    rope_scale: float = 1.0
    rope_factors: tuple[float, ...] | None = None
    rope_interleaved: bool = False
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    attention_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    architecture: str = "llama"

    def __post_init__(self) -> None:
        counts = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
                  "num_kv_heads", "head_dim", "max_context")  # fmt: skip
        for name in counts:
            if getattr(self, name) < 1:
                raise FormatError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise FormatError(
                f"{self.num_heads} query heads do not divide among {self.num_kv_heads} key heads"
            )
        if not 0 < self.norm_eps < 1 or not self.rope_theta > 0 or not self.rope_scale > 0:
            raise FormatError(
                f"norm_eps {self.norm_eps}, rope_theta {self.rope_theta} and rope_scale {self.rope_scale} "
                "must be positive, norm_eps below 1"
            )
        rotary = self.rotary
        if rotary % 2 or not 0 < rotary <= self.head_dim:
            raise UnsupportedError(f"rotary_dim {rotary} must be even and at most head_dim {self.head_dim}")
        if self.rope_factors is not None and len(self.rope_factors) != rotary // 2:
            raise FormatError(f"{len(self.rope_factors)} rope factors for {rotary // 2} frequencies")

    @property
    def rotary(self) -> int:
        """How many leading elements of a head are rotated."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
