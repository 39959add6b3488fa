"""What a replacement costs: the optimised model against its own originals on a text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...compiler.errors import UnsupportedError
from ...kernels.quant_matmul import WeightFormat
from .profiles import INT4, Candidate

if TYPE_CHECKING:
    from .report import Report

_TOKENS = 1024
_CALIBRATION_TOKENS = 256


@dataclass(frozen=True)
class Quality:
    """Means over `tokens` predicted tokens against the original weights; KL in nats."""

    tokens: int
    perplexity: float
    reference_perplexity: float
    mean_kl: float
    top1_agreement: float

    @property
    def perplexity_change(self) -> float:
        """Relative change of the perplexity."""
        return self.perplexity / self.reference_perplexity - 1

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.3f} ({self.perplexity_change:+.2%}), mean KL {self.mean_kl:.5f}, "
            f"likeliest token agrees in {self.top1_agreement:.1%} of {self.tokens} tokens"
        )


def built_in_text() -> str:
    """Return English prose that comes with Python: its language reference."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def token_ids(text: str | Tensor | None, tokenizer: Any, most: int) -> Tensor:
    """Return up to `most` ids [T] of a text, or of the built-in one.

    Raises UnsupportedError without a tokenizer for a text, and for fewer than two tokens.
    """
    if isinstance(text, Tensor):
        ids = text.reshape(-1)
    else:
        if tokenizer is None:
            raise UnsupportedError(
                "a text needs the model's tokenizer: pass tokenizer=, or token ids [T] instead of the text"
            )
        encoded = tokenizer.encode((built_in_text() if text is None else text)[: 8 * most])
        ids = torch.tensor(getattr(encoded, "ids", encoded), dtype=torch.int64)
    if ids.numel() < 2:
        raise UnsupportedError("the text has fewer than two tokens; nothing to compare")
    return ids[:most]


def measure_quality(report: Report, text: Any, *, tokenizer: Any, window: int) -> Quality:
    """See `Report.quality`."""
    if report._undo is None:
        raise UnsupportedError("quality needs the originals: optimize with keep_original=True")
    ids = token_ids(text, tokenizer, _TOKENS)
    parts = [part[None] for part in ids.split(window) if part.numel() > 1]
    want = [_logits(report.model, part, original=report) for part in parts]
    sums = torch.zeros(4, dtype=torch.float64)
    for part, reference in zip(parts, want):
        sums += _compare(_logits(report.model, part), reference, part[0, 1:])
    count = sum(part.shape[1] - 1 for part in parts)
    loss, reference_loss, kl, same = (sums / count).tolist()
    return Quality(count, math.exp(loss), math.exp(reference_loss), kl, same)


@torch.inference_mode()
def _logits(model: nn.Module, ids: Tensor, original: Report | None = None) -> Tensor:
    """Logits [T - 1, V] that predict ids[1:]."""
    if original is None:
        out = model(ids)
    else:
        with original.originals():
            out = model(ids)
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise UnsupportedError("quality needs a causal language model: logits [1, T, vocabulary]")
    return logits[0, :-1].float()


def _compare(got: Tensor, want: Tensor, following: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(want, -1), F.log_softmax(got, -1)
    picked = following[:, None]
    return torch.stack(
        [
            -log_q.gather(1, picked).double().sum(),
            -log_p.gather(1, picked).double().sum(),
            (log_p.exp() * (log_p - log_q)).sum(-1).double().sum(),
            (got.argmax(-1) == want.argmax(-1)).double().sum(),
        ]
    )


def sensitivities(
    model: nn.Module,
    text: Any,
    tokenizer: Any,
    swap: Callable[[str, WeightFormat], Callable[[], None]],
    progress: bool,
    groups: dict[str, list[Candidate]],
) -> dict[str, float]:
    """Return the mean KL on a text when one group of layers alone is INT4, by group.

    `swap(name, format)` puts one layer in, and returns what takes it out again.
    """
    from rich.progress import Progress

    ids = token_ids(text, tokenizer, _CALIBRATION_TOKENS)[None]
    want = _logits(model, ids)
    found = {}
    with Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("measuring sensitivity", total=len(groups))
        for role, candidates in groups.items():
            restore = [swap(c.name, INT4) for c in candidates]
            try:
                found[role] = float(_compare(_logits(model, ids), want, ids[0, 1:])[2]) / (ids.numel() - 1)
            finally:
                for undo in reversed(restore):
                    undo()
            bar.advance(task)
    return found
