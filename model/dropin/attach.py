"""What `optimize` does to a transformers model beside its layers: attention, cache, shorter ways through."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from . import decoder_layer, encoder, latent
from .attention import NAME, head_problem, register
from .cache import prepare_cache
from .find import Found
from .report import Report

_WAYS = {
    decoder_layer: "decoder layers that one token passes by kernels alone",
    encoder: "encoders that leave a batch's padding out",
    latent: "latent attention over the latents themselves, for one token",
}


def attach(model: Any, entries: list[Found], report: Report) -> list[tuple[Found, str]]:
    """Let a model's attention run ours; return each of its modules with the reason why it does not, or ""."""
    register()
    before = model.config._attn_implementation
    problem = ""
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, AttributeError, KeyError, NotImplementedError) as error:
        problem = f"{type(model).__name__} takes no attention from the registry: {error}"
    if not problem and model.config._attn_implementation != NAME:
        problem = f"{type(model).__name__} takes no attention from transformers' registry"
    if not problem:
        undo = functools.partial(model.set_attn_implementation, before)
        _both_ways(report, undo, functools.partial(model.set_attn_implementation, NAME))
        _cache(model, report)
        _ways(model, report)
    return [(entry, problem or head_problem(entry.module)) for entry in entries]


def _both_ways(report: Report, undo: Callable[[], Any], redo: Callable[[], Any]) -> None:
    if report._undo is not None:
        report._undo.append(undo)
        report._redo.append(redo)


def _cache(model: Any, report: Report) -> None:
    """Let `generate` make caches in our layout; without this hook it makes dynamic ones, which work."""
    name = "_prepare_cache_for_generation"
    if not hasattr(type(model), name):
        return
    made = functools.partial(prepare_cache, model)
    setattr(model, name, made)
    _both_ways(report, lambda: model.__dict__.pop(name, None), lambda: setattr(model, name, made))


def _ways(model: Any, report: Report) -> None:
    """Let modules take the shorter ways that there are."""
    for module in model.modules():
        way = next((way for way in (decoder_layer, encoder, latent) if way.known(module)), None)
        if way is None:
            continue
        report.ways[_WAYS[way]] = report.ways.get(_WAYS[way], 0) + 1
        _both_ways(report, way.install(module), functools.partial(way.install, module))
