"""The rows of a generation: prompts, how tokens are drawn, what each row has drawn and why it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compiler.errors import UnsupportedError
from ..runtime import ops
from .streaming import TextStream

Prompt = str | Sequence[int] | Tensor


@dataclass(frozen=True)
class RunStats:
    """What one call of generate did; ``stop_reasons`` are "eos", "stop", "length" or "context", one a row."""

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    stop_reasons: tuple[str, ...]
    seed: int

    @property
    def prefill_speed(self) -> float:
        """Prompt tokens per second."""
        return (self.prompt_tokens - self.reused_tokens) / max(self.prefill_seconds, 1e-9)

    @property
    def decode_speed(self) -> float:
        """New tokens per second, without the one that prefill gave."""
        rows = len(self.stop_reasons)
        return max(0, self.new_tokens - rows) / max(self.decode_seconds, 1e-9)


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits; the default is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise UnsupportedError(f"sampling options out of range: {self}")
        if self.repetition_penalty <= 0:
            raise UnsupportedError(f"repetition_penalty must be positive, not {self.repetition_penalty}")

    def draw(self, logits: Tensor, history: Tensor | None, seed: int, step: int) -> Tensor:
        """logits [B, V] -> int64 [B]."""
        return ops.sample(
            logits,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            previous=history if self.repetition_penalty != 1.0 else None,
            seed=seed,
            step=step,
        )


class Rows:
    """The rows of a running batch: what each has drawn, kept, and why it ended."""

    def __init__(self, count: int, streams: list[TextStream], stop_ids: frozenset[int]) -> None:
        self.streams = streams
        self.stop_ids = stop_ids
        self.drawn: list[list[int]] = [[] for _ in range(count)]
        self.kept: list[list[int]] = [[] for _ in range(count)]
        self.reasons: list[str | None] = [None] * count

    @property
    def done(self) -> bool:
        return all(self.reasons)

    def take(self, tokens: list[int]) -> None:
        for row, token in enumerate(tokens):
            if self.reasons[row]:
                continue
            self.drawn[row].append(token)
            if token in self.stop_ids:
                self.reasons[row] = "eos"
                continue
            self.kept[row].append(token)
            if self.streams[row].push(token):
                self.reasons[row] = "stop"

    def finish(self, reason: str) -> None:
        self.reasons = [known or reason for known in self.reasons]


def as_batch(prompt: Any) -> tuple[list[Any], bool]:
    if isinstance(prompt, str):
        return [prompt], False
    if isinstance(prompt, Tensor):
        return ([prompt], False) if prompt.dim() == 1 else (list(prompt), True)
    items = list(prompt)
    if not items:
        raise UnsupportedError("an empty prompt: give a text or at least one token")
    return ([items], False) if isinstance(items[0], int) else (items, True)


def token_ids(prompt: Any) -> list[int]:
    return prompt.tolist() if isinstance(prompt, Tensor) else [int(token) for token in prompt]


def pad_left(rows: list[list[int]]) -> Tensor:
    """int64 [B, longest]; a row is padded with its own first token, which adds nothing to its history."""
    longest = max(map(len, rows))
    return torch.tensor([[row[0]] * (longest - len(row)) + row for row in rows])
