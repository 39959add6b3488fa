"""What tuning won of a whole model: its speed with the records of before and with those of now, in turn."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable

import torch

from ..compiler.target import available_memory
from ..runtime import dispatch, recorded
from ..runtime.threads import set_threads
from .generate import LanguageModel

ROUNDS = 5
_ROOM = 1.2  # times the first model's weights and cache that have to be free for a second one

Speeds = dict[str, float]


def speeds(model: LanguageModel, prompt: int = 512, new: int = 32, repeats: int = 3) -> Speeds:
    """Return tokens a second of "prefill" and "decode", medians of a few runs."""
    return _medians([_run(model, prompt, new) for _ in range(repeats)])


def side_by_side(
    load: Callable[[], LanguageModel], earlier: recorded.Known, before: Speeds
) -> tuple[Speeds, Speeds]:
    """Return the speeds with the `earlier` records and with those of now, run by run in turn.

    A machine whose speed changes with the minutes then shows no gain or loss that is not there. Without room
    for two models, the first are `before`: what was measured at the time.
    """
    new = load()
    if available_memory() < _ROOM * (new.memory()["weights"] + new.memory()["kv"]):
        return before, speeds(new)
    with recorded.held(earlier):
        old = load()
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
