"""Rotary positions: what a model file says about them, and the tables that come of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compiler.errors import FormatError, UnsupportedError

SCALINGS = ("none", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Rope:
    """Frequencies theta ** (-2i / rotary_dim) of the rotated pairs i (RoFormer, arXiv:2104.09864), scaled.

    ``scaling``: "none"; "linear" divides every frequency by ``factor`` (arXiv:2306.15595); "llama3" those
    whose wavelength is long against ``original_context``, by ``low_freq_factor`` and ``high_freq_factor``;
    "yarn" those between ``beta_fast`` and ``beta_slow`` rotations of it (arXiv:2309.00071); "longrope" takes
    ``long_factors`` instead of ``factors`` for contexts beyond it (arXiv:2402.13753). ``factors`` divide one
    frequency each, in any scaling. ``attention_factor`` multiplies cosines and sines.

    Raises:
        UnsupportedError: an unknown scaling.
        FormatError: a number makes no sense.
    """

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # of yarn: whether the corrected range ends at whole pairs
    attention_factor: float = 1.0
    factors: tuple[float, ...] | None = None
    long_factors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.scaling not in SCALINGS:
            raise UnsupportedError(
                f"rope scaling {self.scaling!r} is not supported ({', '.join(SCALINGS)} are)"
            )
        positive = ("theta", "factor", "beta_fast", "beta_slow", "attention_factor", "low_freq_factor")
        for name in positive:
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise FormatError(f"rope {name} is {value}; it must be positive")
        if self.scaling in ("llama3", "yarn", "longrope") and self.original_context < 2:
            raise FormatError(
                f"rope scaling {self.scaling!r} needs the context that the model was trained for"
            )
        if self.scaling == "llama3" and not self.high_freq_factor > self.low_freq_factor:
            raise FormatError(
                f"rope high_freq_factor {self.high_freq_factor} must exceed low_freq_factor "
                f"{self.low_freq_factor}"
            )
        if self.scaling == "yarn" and not self.theta > 1:
            raise FormatError(f"rope scaling 'yarn' needs a theta above 1, not {self.theta}")
        if self.scaling == "longrope" and (self.factors is None or self.long_factors is None):
            raise FormatError("rope scaling 'longrope' needs short and long factors")
        for factors in (self.factors, self.long_factors):
            if factors is not None and not all(0 < f < math.inf for f in factors):
                raise FormatError("a rope factor is not a positive number")

    def check_size(self, rotary: int) -> None:
        """Raise FormatError unless the factors fit ``rotary`` rotated elements."""
        for factors in (self.factors, self.long_factors):
            if factors is not None and len(factors) != rotary // 2:
                raise FormatError(f"{len(factors)} rope factors for {rotary // 2} frequencies")

    def frequencies(self, rotary: int, context: int) -> Tensor:
        """Radians a token of each pair, float32 [rotary / 2], for a model loaded with ``context`` tokens."""
        base = 1.0 / (self.theta ** (torch.arange(0, rotary, 2, dtype=torch.float32) / rotary))
        if self.factors is not None:
            long = self.scaling == "longrope" and context > self.original_context
            base = base / torch.tensor(self.long_factors if long else self.factors)
        if self.scaling == "linear":
            return base / self.factor
        if self.scaling == "llama3":
            return self._llama3(base)
        return self._yarn(base, rotary) if self.scaling == "yarn" else base

    def _llama3(self, base: Tensor) -> Tensor:
        wavelengths = 2 * math.pi / base
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = ((self.original_context / wavelengths - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * base / self.factor + kept * base

    def _yarn(self, base: Tensor, rotary: int) -> Tensor:
        def pair(rotations: float) -> float:
            """The pair that turns so often within the original context, as a real number."""
            turns = self.original_context / (rotations * 2 * math.pi)
            return rotary * math.log(turns) / (2 * math.log(self.theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = float(math.floor(low)), float(math.ceil(high))
        low, high = max(low, 0.0), min(high, rotary - 1.0)
        ramp = (torch.arange(rotary // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
        interpolated = ramp.clamp(0, 1)
        return base / self.factor * interpolated + base * (1 - interpolated)

    def tables(self, rotary: int, context: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of every position, float32 [context, rotary / 2]."""
        positions = torch.arange(context, dtype=torch.float32)
        angle = positions[:, None] * self.frequencies(rotary, context)
        return angle.cos() * self.attention_factor, angle.sin() * self.attention_factor


def yarn_attention_factor(factor: float, mscale: float = 1.0, mscale_all_dim: float = 0.0) -> float:
    """YaRN's temperature, as a factor of cosines and sines, where a file names none."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return scale(mscale) / scale(mscale_all_dim)
    return scale(1.0)


def longrope_attention_factor(factor: float, original_context: int) -> float:
    """LongRoPE's factor of cosines and sines, where a file names none."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_context))
