"""What tuning won of a whole model: its speed with the records of before and with those of now, in turn."""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Sequence

import torch

from ..compiler.tuner import Outcome
from ..runtime import dispatch, recorded
from ..runtime.threads import set_threads
from .compiled import compile_decoder
from .generate import LanguageModel

ROUNDS = 5

Speeds = dict[str, float]


def speeds(model: LanguageModel, prompt: int = 512, new: int = 32, repeats: int = 3) -> Speeds:
    """Return tokens a second of "prefill" and "decode", medians of a few runs."""
    return _medians([_run(model, prompt, new) for _ in range(repeats)])


def changed(outcomes: Sequence[Outcome], earlier: recorded.Known) -> bool:
    """Return whether some problem runs with another configuration than with the `earlier` records."""
    for outcome in outcomes:
        if outcome.state == "tuned" and outcome.record is not None:
            problem = outcome.problem
            with recorded.held(earlier):
                before = recorded.chosen(problem.wanted, problem.space)
            if before != problem.space.complete(outcome.record.configuration):
                return True
    return False


def side_by_side(new: LanguageModel, earlier: recorded.Known) -> tuple[Speeds, Speeds]:
    """Return the speeds with the `earlier` records and with those of now, which `new` was loaded with.

    Run by run in turn, over the same weights and cache: a machine whose speed changes with the minutes, and
    with where a model's memory comes to lie, shows no gain or loss that is not there.
    """
    _run(new)  # makes the cache, which both use
    old = copy.copy(new)
    if not new.whole_step_declined:
        with recorded.held(earlier):
            compiled, _ = compile_decoder(new.decoder, new.target, new.kv, check=False)
        old.step = compiled or new.step
    found: dict[int, list[tuple[float, float]]] = {0: [], 1: []}
    for turn in range(ROUNDS + 1):
        for which in (0, 1) if turn % 2 else (1, 0):
            model = (old, new)[which]
            with recorded.held(earlier) if which == 0 else contextlib.nullcontext():
                if model.whole_step_declined:  # operators are bound anew, with these records, by a run before
                    dispatch.forget()
                    _run(model)
                run = _run(model)
            if turn:  # the first is a warm-up
                found[which].append(run)
    return _medians(found[0]), _medians(found[1])


def _run(model: LanguageModel, prompt: int = 512, new: int = 32) -> tuple[float, float]:
    """Return tokens a second of one prompt and of the tokens behind it."""
    set_threads(model.threads)
    prompt = max(1, min(prompt, model.context - new - 1))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (prompt,), generator=generator).tolist()
    model.generate(ids, max_tokens=new, ignore_eos=True)
    assert model.last_run is not None
    return model.last_run.prefill_speed, model.last_run.decode_speed


def _medians(runs: list[tuple[float, float]]) -> Speeds:
    prefill, decode = (statistics.median(column) for column in zip(*runs))
    return {"prefill": prefill, "decode": decode}
