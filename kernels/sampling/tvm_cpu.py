"""sampling on a CPU through TVM: one pass for greedy, two or three for the rest, rows in parallel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...compiler.errors import EdgeFormerError
from ...compiler.operator import Configuration, Declined, Form
from ...compiler.target import Target
from ..shared.scratch import scratch
from .space import space
from .spec import ONE, SamplingOptions, SamplingSpec
from .workspace import Workspace

_INT64 = 1 << 64


def decide(spec: SamplingSpec, target: Target) -> Declined | None:
    """Accept every vocabulary on a CPU that the back end knows."""
    if "tvm_llvm" not in target.backends:
        return Declined(f"target {target.name} has no tvm_llvm back end")
    return None


def lower(spec: SamplingSpec, configuration: Configuration, target: Target) -> list[Any]:
    """Return the PrimFuncs `greedy`, `sample`, `sample_filtered` and `penalize`."""
    from ..shared.isa import table

    lanes = table.for_target(target).lanes
    return [_greedy(spec, lanes), _sample(spec, lanes), _sample_filtered(spec, lanes), _penalize(spec, lanes)]


_ROWS = [("logits", "*float32"), ("tokens", "*int64"), ("scratch", "int64"), ("rows", "int64")]
_DRAW = [("scale", "float32"), ("min_weight", "int64"), ("seed", "int64"), ("step", "int64")]


def _greedy(spec: SamplingSpec, lanes: int) -> Any:
    from ..shared import tir

    k = tir.Kernel("greedy", _ROWS)
    with tir.parallel(k["rows"]) as row:
        _row(spec, lanes, k, row).greedy(k["tokens"], row)
    return k.finish()


def _sample(spec: SamplingSpec, lanes: int) -> Any:
    from ..shared import tir
    from .tvm_emit import random_bits

    k = tir.Kernel("sample", _ROWS + _DRAW)
    with tir.parallel(k["rows"]) as row:
        sampler = _row(spec, lanes, k, row)
        sampler.greedy(k["tokens"], row)  # the answer where no logit, or an infinite one, is largest
        with tir.when(sampler.is_finite()):
            random = random_bits(k["seed"], k["step"], row)
            smallest = tir.let(tir.cast(k["min_weight"], "int32"))
            sampler.sample_all(k["scale"], smallest, random, k["tokens"], row)
    return k.finish()


def _sample_filtered(spec: SamplingSpec, lanes: int) -> Any:
    from ..shared import tir
    from .tvm_emit import random_bits

    k = tir.Kernel("sample_filtered", [*_ROWS, *_DRAW, ("top_k", "int64"), ("top_p", "int64")])
    with tir.parallel(k["rows"]) as row:
        sampler = _row(spec, lanes, k, row)
        sampler.greedy(k["tokens"], row)
        with tir.when(sampler.is_finite()):
            random = random_bits(k["seed"], k["step"], row)
            smallest = tir.let(tir.cast(k["min_weight"], "int32"))
            sampler.sample_filtered(k["scale"], k["top_k"], k["top_p"], smallest, random, k["tokens"], row)
    return k.finish()


def _row(spec: SamplingSpec, lanes: int, k: Any, row: Any) -> Any:
    from ..shared import tir
    from .tvm_emit import RowSampler

    space_of_row = tir.let(k["scratch"] + row * Workspace(spec.vocab_size).nbytes)
    return RowSampler(spec, lanes, k["logits"], tir.let(row * spec.vocab_size), space_of_row)


def _penalize(spec: SamplingSpec, lanes: int) -> Any:
    """Copy a row, then penalise the tokens of `previous` from the original logits: each counts once."""
    from ..shared import tir
    from ..shared.math import pieces
    from ..shared.tir import T

    vocab = spec.vocab_size
    args = [("logits", "*float32"), ("out", "*float32"), ("previous", "*int64"), ("rows", "int64")]
    k = tir.Kernel("penalize", [*args, ("count", "int64"), ("penalty", "float32")])
    with tir.parallel(k["rows"]) as row:
        start = tir.let(row * vocab)
        main = vocab // lanes
        with tir.loop(main) as v:
            tir.store(k["out"], start + v * lanes, tir.load(k["logits"], start + v * lanes, lanes))
        for at, width in pieces(vocab - main * lanes, lanes):
            at += main * lanes
            tir.store(k["out"], start + at, tir.load(k["logits"], start + at, width))
        with tir.loop(k["count"]) as i:
            token = tir.let(tir.load(k["previous"], row * k["count"] + i))
            with tir.when(token >= 0):
                x = tir.let(tir.load(k["logits"], start + token))
                value = T.Select(x < tir.f32(0.0), x * k["penalty"], x / k["penalty"])
                tir.store(k["out"], start + token, value)
    return k.finish()


def bind(
    spec: SamplingSpec, configuration: Configuration, target: Target, library: Any
) -> Callable[..., Any]:
    """Return call(logits fp32 [B, V], options, previous=None int64 [B, *], seed=0, step=0) -> int64 [B]."""
    greedy, sample, sample_filtered, penalize = (
        library.function(name) for name in ("greedy", "sample", "sample_filtered", "penalize")
    )
    vocab, row_bytes = spec.vocab_size, Workspace(spec.vocab_size).nbytes

    def call(
        logits: torch.Tensor,
        options: SamplingOptions,
        previous: torch.Tensor | None = None,
        seed: int = 0,
        step: int = 0,
    ) -> torch.Tensor:
        rows = logits.shape[0]
        if logits.dim() != 2 or logits.shape[1] != vocab or logits.dtype != torch.float32:
            raise EdgeFormerError(
                f"logits have to be float32 [B, {vocab}], not {logits.dtype} {tuple(logits.shape)}"
            )
        logits = logits.contiguous()
        if previous is not None and previous.numel() and options.repetition_penalty != 1.0:
            if previous.dtype != torch.int64 or previous.dim() != 2 or previous.shape[0] != rows:
                raise EdgeFormerError(f"previous has to be int64 [{rows}, *], not {previous.dtype}")
            previous = previous.contiguous()
            if int(previous.max()) >= vocab:
                raise EdgeFormerError(f"previous holds id {int(previous.max())}, the logits have {vocab}")
            source, logits = logits, torch.empty_like(logits)
            penalize(
                source.data_ptr(), logits.data_ptr(), previous.data_ptr(), rows, previous.shape[1],
                options.repetition_penalty,
            )  # fmt: skip
        tokens = torch.empty(rows, dtype=torch.int64)
        args = (logits.data_ptr(), tokens.data_ptr(), scratch(rows * row_bytes), rows)
        if options.greedy:
            greedy(*args)
            return tokens
        drawn = (options.scale, options.min_weight, _signed(seed), _signed(step))
        top_k = options.top_k if options.top_k < vocab else 0
        if top_k or options.top_p_fixed < ONE:
            sample_filtered(*args, *drawn, top_k, options.top_p_fixed)
        else:
            sample(*args, *drawn)
        return tokens

    return call


def _signed(value: int) -> int:
    """Return the low 64 bits as a signed integer."""
    value %= _INT64
    return value - _INT64 if value >= _INT64 // 2 else value


FORM = Form(
    "tvm_cpu",
    "tvm_llvm",
    decide,
    space,
    bind,
    lower,
    ("kernels/sampling", "kernels/shared", "compiler/backends/tvm_llvm.py"),
)
