"""Norm, rope, embedding and sampling as problems of `bench ops`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from ..kernels.quant_matmul import CanonicalWeight, WeightFormat, pack
from ..runtime import ops
from ..runtime.dispatch import current_target
from .op_cases import Problem, relative_error


def norm_problem(s: dict[str, Any], m: int, form: str | None) -> Problem:
    """Return RMSNorm of m rows, beside torch.nn.functional.rms_norm."""
    x, weight = torch.randn(m, s["hidden"]), torch.rand(s["hidden"])
    ours = lambda: ops.norm(x, weight, form=form)  # noqa: E731
    peer = lambda: F.rms_norm(x, (s["hidden"],), weight, 1e-5)  # noqa: E731
    error = lambda: relative_error(ours(), ops.norm(x, weight, form="reference"))  # noqa: E731
    return Problem(ours, {"torch rms_norm": peer}, error, 4 * x.numel(), 2 * x.nbytes, m, True, "float")


def rope_problem(s: dict[str, Any], m: int, form: str | None) -> Problem:
    """Return the rotation of a model's queries, beside transformers' eager formula."""
    d = s["head_dim"]
    x, angles = torch.randn(1, s["heads"], m, d), torch.rand(m, d // 2)
    cos, sin = angles.cos(), angles.sin()
    wide_cos, wide_sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)

    def peer() -> Any:
        low, high = x.chunk(2, -1)
        return x * wide_cos + torch.cat([-high, low], -1) * wide_sin

    ours = lambda: ops.rope(x, cos, sin, form=form)  # noqa: E731
    error = lambda: relative_error(ours(), ops.rope(x, cos, sin, form="reference"))  # noqa: E731
    return Problem(ours, {"torch eager": peer}, error, 3 * x.numel(), 2 * x.nbytes, m, True, "float")


def embedding_problem(s: dict[str, Any], m: int, form: str | None) -> Problem:
    """Return m rows of an int8 table, beside torch's lookup in a bf16 one."""
    fmt, n, k = WeightFormat.int8(), s["vocab"], s["hidden"]
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    canonical = CanonicalWeight(fmt, codes, torch.rand(n, fmt.groups(k)).half())
    packed, table = pack(canonical, current_target()), torch.randn(n, k, dtype=torch.bfloat16)
    ids = torch.randint(0, n, (m,))
    ours = lambda: ops.embedding(ids, packed, form=form)  # noqa: E731
    error = lambda: relative_error(ours(), ops.embedding(ids, packed, form="reference"))  # noqa: E731
    moved = m * (k + 2 * fmt.groups(k) + 4 * k)
    peers = {"torch bf16": lambda: F.embedding(ids, table)}
    return Problem(ours, peers, error, 2 * m * k, moved, m, True, "float")


def sampling_problem(s: dict[str, Any], m: int, form: str | None) -> Problem:
    """Return a draw by temperature, top-k and top-p, beside the same in eager PyTorch."""
    logits = torch.randn(m, s["vocab"])
    options = {"temperature": 0.8, "top_k": 40, "top_p": 0.95}
    ours = lambda: ops.sample(logits, **options, seed=1, form=form)  # noqa: E731

    def peer() -> Any:
        values, indices = (logits / 0.8).topk(40)
        p = values.softmax(-1)
        p = p.masked_fill(p.cumsum(-1) - p > 0.95, 0.0)
        return indices.gather(-1, torch.multinomial(p, 1))

    def error() -> float:
        return float((ours() != ops.sample(logits, **options, seed=1, form="reference")).float().mean())

    return Problem(ours, {"torch eager": peer}, error, 4 * logits.numel(), logits.nbytes, m, True, "float")


PROBLEMS: dict[str, Callable[[dict[str, Any], int, str | None], Problem]] = {
    "norm": norm_problem,
    "rope": rope_problem,
    "embedding": embedding_problem,
    "sampling": sampling_problem,
}
