"""The problem of the sampling operator: one token for each row of logits."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

from ...compiler.errors import UnsupportedError

# The fixed-point constants of the definition; reference.py says what they mean.
FRACTION_BITS = 15
CAP = 32 * (1 << FRACTION_BITS) - 1
EXP2 = (45425, 15729, 3554, 483)
WEIGHT_BITS = 30
ONE = 1 << 31  # top_p in fixed point: 1.0, no cut


@dataclass(frozen=True)
class SamplingSpec:
    """Choose from fp32 logits [B, vocab_size]; batch and options are run-time arguments."""

    vocab_size: int

    def __post_init__(self) -> None:
        if not 1 <= self.vocab_size <= 1 << 20:
            raise UnsupportedError(f"sampling from {self.vocab_size} tokens: needs 1 to {1 << 20}")

    def key(self) -> str:
        """One line that names the problem completely."""
        return f"sampling vocab={self.vocab_size}"

    def flops(self, rows: int) -> int:
        """Return the comparisons of a greedy choice."""
        return rows * self.vocab_size

    def bytes(self, rows: int) -> int:
        """Return the bytes that have to move: one read of the logits."""
        return 4 * rows * self.vocab_size


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is chosen, applied in the order of transformers, which is the order of the fields:

    repetition_penalty (1.0: off) divides positive and multiplies negative logits of every token in
    `previous`; temperature (0: greedy, nothing below applies); top_k (0: off) keeps the k largest
    logits and their ties; top_p (1.0: off) keeps a token while the probability of all larger logits is
    below top_p, ties together; min_p (0: off) drops tokens below min_p times the largest probability.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        checks = (
            (
                self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty),
                "repetition_penalty > 0",
            ),
            (self.temperature >= 0 and math.isfinite(self.temperature), "temperature >= 0"),
            (self.top_k >= 0, "top_k >= 0"),
            (0 < self.top_p <= 1, "0 < top_p <= 1"),
            (0 <= self.min_p <= 1, "0 <= min_p <= 1"),
        )
        for holds, rule in checks:
            if not holds:
                raise UnsupportedError(f"sampling options have to satisfy {rule}: {self}")

    @property
    def greedy(self) -> bool:
        """Whether the largest logit is taken."""
        return self.temperature == 0

    @property
    def scale(self) -> float:
        """Return 2^15 * log2(e) / temperature rounded to fp32, at most 1e30."""
        exact = min((1 << FRACTION_BITS) * math.log2(math.e) / self.temperature, 1e30)
        return struct.unpack("f", struct.pack("f", exact))[0]

    @property
    def top_p_fixed(self) -> int:
        """Return top_p in units of 2^-31, at least one unit."""
        return max(1, round(self.top_p * ONE))

    @property
    def min_weight(self) -> int:
        """Return the smallest weight that min_p keeps, at least 1."""
        return max(1, math.ceil(self.min_p * (1 << WEIGHT_BITS)))
