"""What an engine loses against fp32 PyTorch on the file's own weights: perplexity, KL, likeliest token."""

from __future__ import annotations

import math
import pydoc_data
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..compiler.errors import EdgeFormerError
from .options import QUALITY_WINDOW

ROWS = 128  # tokens whose logits are compared at once


def english() -> str:
    """Return English prose that every Python has: the topics of its own documentation, in a fixed order."""
    from pydoc_data import topics

    return "\n".join(topics.topics[name] for name in sorted(topics.topics))


def windows_of(ids: Sequence[int]) -> list[list[int]]:
    """Cut token ids into windows that are each read from an empty cache."""
    cut = [list(ids[i : i + QUALITY_WINDOW]) for i in range(0, len(ids), QUALITY_WINDOW)]
    return [window for window in cut if len(window) > 1]


def unavailable(reason: str) -> dict[str, Any]:
    """Return the quality of an engine that could not be judged."""
    return {"status": "unavailable", "reason": reason}


def judge(
    windows: Sequence[Sequence[int]], reference: Path, logits: Callable[[Sequence[int], Path], None]
) -> dict[str, Any]:
    """Compare an engine's logits with `reference`/reference-N.npy, over every token but a window's first.

    `logits(ids, out)` writes an engine's logits fp32 [tokens, vocabulary]. Perplexities are of the next
    token, KL(reference || engine) is in nats, all means over `tokens`.
    """
    import numpy as np
    import torch

    from ..model.evaluate import compare_logits

    sums = torch.zeros(4, dtype=torch.float64)
    for i, window in enumerate(windows):
        out = reference / "engine.npy"
        try:
            logits(window, out)
        except EdgeFormerError as error:
            return unavailable(str(error))
        got = np.load(out, mmap_mode="r")
        expected = np.load(reference / f"reference-{i}.npy", mmap_mode="r")
        if got.shape != expected.shape:
            return unavailable(f"its logits are {got.shape}, the reference's {expected.shape}")
        following = torch.tensor(window[1:])
        for start in range(0, len(window) - 1, ROWS):
            rows = slice(start, min(start + ROWS, len(window) - 1))
            ours, theirs = (torch.from_numpy(np.array(table[rows])) for table in (got, expected))
            sums += compare_logits(ours, theirs, following[rows])
    count = sum(len(window) - 1 for window in windows)
    loss, reference_loss, kl, same = (sums / count).tolist()
    return {
        "status": "measured",
        "text": f"{pydoc_data.__name__}.topics",
        "tokens": count,
        "perplexity": round(math.exp(loss), 5),
        "reference_perplexity": round(math.exp(reference_loss), 5),
        "mean_kl": float(f"{kl:.4g}"),
        "top1_agreement": round(same, 5),
    }
