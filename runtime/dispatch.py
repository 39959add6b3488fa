"""Which form runs: a pure choice with reasons, and a memory of what was bound."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..compiler.errors import BuildError, DeclinedError
from ..compiler.lookup import bucket
from ..compiler.operator import Form, Operator, Sizes
from ..compiler.target import Target, detect
from . import launch, recorded


@dataclasses.dataclass(frozen=True)
class Choice:
    """What dispatch chose: the form, its configuration, where that came from, and who declined why.

    `record` is "default", or which tuning record it is: exact or nearest, of which device, whose.
    """

    operator: str
    spec: str
    form: str
    backend: str
    configuration: dict[str, Any]
    record: str
    declined: tuple[tuple[str, str], ...] = ()


def choose(
    operator: Operator, spec: Any, target: Target, form: str | None = None, sizes: Sizes | None = None
) -> tuple[Form, Choice]:
    """Return the first form of `operator` that accepts `spec` on `target`, and the reasons.

    With the run-time `sizes` of the call, a tuning record of their bucket gives the configuration. Asking
    for a `form` by name raises DeclinedError when it declines or does not exist.
    """
    declined: list[tuple[str, str]] = []
    for candidate in operator.forms:
        if form is not None and candidate.name != form:
            continue
        answer = candidate.decide(spec, target)
        if answer is None:
            configuration, record = recorded.configuration(operator, candidate, spec, sizes, target)
            choice = Choice(
                operator.name,
                spec.key(),
                candidate.name,
                candidate.backend,
                configuration,
                record,
                tuple(declined),
            )
            return candidate, choice
        declined.append((candidate.name, answer.reason))
    names = ", ".join(f.name for f in operator.forms)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in declined) or f"no such form; forms: {names}"
    raise DeclinedError(f"{operator.name} {spec.key()} on {target.name}: {reasons}")


_target: Target | None = None
_generation = 0
_planned: list[tuple[str, Form, Any]] | None = None  # what was chosen for another device
_bound: dict[tuple[Any, ...], Callable[..., Any]] = {}
_choices: dict[tuple[Any, ...], Choice] = {}


def current_target() -> Target:
    """Return the target that ops compile for (this host unless `use_target` said otherwise)."""
    return _target or detect()


def use_target(target: Target | None) -> None:
    """Set the target of ops that are bound from now on; None is this host."""
    global _target, _generation
    if target is not None:
        launch.require_runnable(target)
    if target != _target:
        _generation += 1
    _target = target


def forget() -> None:
    """Bind every operator again at its next call: for compiling, which has to see what is used."""
    global _generation
    _generation += 1
    _bound.clear()


def generation() -> int:
    """Return a number that changes with the target: callers that keep a bound callable compare it."""
    return _generation


def bound(
    operator: Operator, spec: Any, form: str | None = None, sizes: Sizes | None = None
) -> Callable[..., Any]:
    """Return the callable for (operator, spec) on the current target; later calls are one look-up.

    `sizes` are the call's run-time sizes: their bucket chooses the configuration, the callable takes any.
    When the chosen form cannot be built, the next one that accepts runs instead and the choice says why; an
    explicit request raises BuildError.
    """
    buckets = tuple((name, bucket(size)) for name, size in sizes.items()) if sizes else ()
    key = (operator.name, spec, form, _target, buckets)
    found = _bound.get(key)
    if found is None:
        found, choice = _bind(operator, spec, form, sizes)
        _bound[key] = found
        _choices[key] = choice
    return found


@contextmanager
def planning(target: Target) -> Iterator[list[tuple[str, Form, Any]]]:
    """Collect (operator, form, spec) of what `target` would run, while the reference forms compute here.

    For compiling for another device: nothing of the target's own code runs.
    """
    global _target, _planned
    before, chosen = _target, []
    _target, _planned = target, chosen
    forget()
    try:
        yield chosen
    finally:
        _target, _planned = before, None
        forget()


def _bind(
    operator: Operator, spec: Any, form: str | None, sizes: Sizes | None
) -> tuple[Callable[..., Any], Choice]:
    target = current_target()
    if _planned is not None:
        chosen, choice = choose(operator, spec, target, form, sizes)
        _planned.append((operator.name, chosen, spec))
        return operator.form("reference").bind(spec, {}, target, None), choice
    failed: list[tuple[str, str]] = []
    remaining = operator
    while True:
        chosen, choice = choose(remaining, spec, target, form, sizes)
        try:
            call = launch.bind(operator, chosen, spec, choice.configuration, target)
        except BuildError as error:
            if form is not None or chosen is operator.forms[-1]:
                raise
            failed.append((chosen.name, f"not built: {error}"))
            launch.warn_once(f"{operator.name} runs its slower form: {error}")
            remaining = dataclasses.replace(
                remaining, forms=tuple(f for f in remaining.forms if f is not chosen)
            )
            continue
        if sizes and launch.is_recording():
            recorded.bind_buckets(operator, chosen, spec, sizes, target)
        return call, dataclasses.replace(choice, declined=(*failed, *choice.declined))


def note(choice: Choice) -> None:
    """Put a choice that was made elsewhere (kernels on a GPU) into the report."""
    _choices[(choice.operator, choice.spec, choice.form)] = choice


def choices() -> list[Choice]:
    """Return what was bound in this process, in order; buckets that share a configuration once."""
    found: list[Choice] = []
    for choice in _choices.values():
        if choice not in found:
            found.append(choice)
    return found
