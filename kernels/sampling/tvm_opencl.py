"""sampling on an OpenCL device: one work-group a row of logits; the same integers and tokens.

Cuts are found by bisection over the logits' bits in order: top_k by counting, top_p by summing weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...compiler.operator import Configuration, Declined
from ...compiler.target import Target
from ..shared.device_check import random_tensors
from ..shared.device_form import device_form, lanes_space
from . import reference
from .spec import ONE, SamplingOptions, SamplingSpec


def decide(spec: SamplingSpec, target: Target) -> Declined | None:
    """Accept every vocabulary."""
    return None


def lower(spec: SamplingSpec, configuration: Configuration, target: Target) -> list[Any]:
    """Return the kernels `penalize`, `greedy` and `draw`."""
    from . import tvm_opencl_emit as emit

    lanes = int(configuration["lanes"])
    return [emit.penalize(spec, lanes), emit.greedy(spec, lanes), emit.draw(spec, lanes)]


def bind(
    spec: SamplingSpec, configuration: Configuration, target: Target, library: Any
) -> Callable[..., None]:
    """Return `call(logits, token, draws, rows, options, seed=0, step=0, history=None, adjusted=None)`.

    logits fp32 [rows, V]; token int32 [rows]; `draws` an int32 [rows, 2] on the device that `call` writes, a
    DeviceTensor like all others here. With a penalty, `history` int32 [rows, n] are the tokens that it
    looks at (negative: none), and `adjusted` has the logits' shape.
    """
    penalty, greedy, draw = (library.function(name) for name in ("penalize", "greedy", "draw"))
    lanes, vocab = int(configuration["lanes"]), spec.vocab_size

    def call(
        logits: Any, token: Any, draws: Any, rows: int, options: SamplingOptions, seed: int = 0,
        step: int = 0, history: Any = None, adjusted: Any = None,
    ) -> None:  # fmt: skip
        if history is not None and options.repetition_penalty != 1.0:
            count = history.shape[1]
            logits.session.copy(adjusted, logits, 4 * rows * vocab)
            penalty(
                (-(-count // lanes), rows), logits=logits.buffer, history=history.buffer, y=adjusted.buffer,
                count=count, penalty=options.repetition_penalty,
            )  # fmt: skip
            logits = adjusted
        if options.greedy:
            greedy((rows,), logits=logits.buffer, token=token.buffer)
            return
        numbers = [reference.draw(seed, step, row) for row in range(rows)]
        halves = [[number >> 31, number & 0x7FFFFFFF] for number in numbers]
        draws.session.write(draws, torch.tensor(halves, dtype=torch.int32))
        most = options.top_k if 0 < options.top_k < vocab else 0
        top_p = options.top_p_fixed if options.top_p_fixed < ONE else 0
        draw(
            (rows,), logits=logits.buffer, token=token.buffer, draws=draws.buffer, scale=options.scale,
            top_k=most, top_p=top_p, min_weight=options.min_weight,
        )  # fmt: skip

    return call


def verify(spec: SamplingSpec, configuration: Configuration, session: Any, library: Any) -> str:
    """Choose from three rows in every way; the tokens have to be the reference's."""
    call = bind(spec, configuration, None, library)  # pyright: ignore[reportArgumentType]
    (logits,) = random_tensors(4, (3, spec.vocab_size))
    logits = logits * 3
    previous = torch.arange(12, dtype=torch.int64).view(3, 4) % spec.vocab_size
    held, history = session.upload(logits), session.upload(previous.int())
    adjusted = session.empty(*logits.shape)
    token, draws = session.empty(3, dtype=torch.int32), session.empty(3, 2, dtype=torch.int32)
    for options in (
        SamplingOptions(), SamplingOptions(1.3), SamplingOptions(1.0, 0.8),
        SamplingOptions(1.2, 1.0, 20, 0.9, 0.02),
    ):  # fmt: skip
        call(held, token, draws, 3, options, 7, 5, history, adjusted)
        wanted = reference.sample(spec, logits, options, previous, 7, 5).tolist()
        if (got := token.read().tolist()) != wanted:
            return f"sampling with {options} takes {got}, not {wanted}"
    return ""


FORM = device_form(
    decide, lanes_space, lower, bind, verify, "kernels/sampling/tvm_opencl.py",
    "kernels/sampling/tvm_opencl_emit.py", "kernels/sampling/spec.py",
)  # fmt: skip
