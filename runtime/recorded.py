"""Which configuration a form runs with: a tuning record's, checked where it has to be, or the default."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any

from ..compiler.lookup import Found, Wanted, look_up, stale
from ..compiler.operator import Form, Operator, Sizes
from ..compiler.records import Record, RecordStore, policy
from ..compiler.space import Space
from ..compiler.target import Target
from . import launch

_BUCKETS = (1, 2, 4, 8, 16, 32, 128, 512, 2048, 8192)


Known = tuple[RecordStore, list[tuple[Record, str]]]
_held: list[Known] = []


@functools.cache
def _read() -> Known:
    store = RecordStore()
    return store, store.all()


def known() -> Known:
    """Return the records that look-ups see now."""
    return _held[-1] if _held else _read()


def forget() -> None:
    """Read the records anew at the next look-up (after tuning or an import in this process)."""
    _read.cache_clear()


@contextlib.contextmanager
def held(records: Known) -> Iterator[None]:
    """Let look-ups see these records of an earlier `known`, whatever is stored now."""
    _held.append(records)
    try:
        yield
    finally:
        _held.pop()


def configuration(
    operator: Operator, form: Form, spec: Any, sizes: Sizes | None, target: Target
) -> tuple[dict[str, Any], str]:
    """Return (configuration, where it comes from): "default", or which record's it is."""
    travelled = launch.travelled_configuration(operator.name, form, spec, target, sizes)
    if travelled is not None:  # nothing else may be there to build with
        return travelled, "default"
    space = form.space(spec, target)
    if sizes is None or form.tuning is None or not isinstance(space, Space) or policy() == "off":
        return space[0], "default"
    import torch

    for found, problem in explain(operator, form, spec, sizes, target, torch.get_num_threads()):
        if not problem:
            part = space.of_phase(found.record.phase)
            return part.complete(found.record.configuration), describe(found)
    return space[0], "default"


def chosen(wanted: Wanted, space: Space) -> dict[str, Any] | None:
    """Return the configuration that a problem has by the records; None where that takes a check on a device.

    `space` is that of the problem's phase.
    """
    for found in look_up(wanted, known()[1]):
        if not _refusal(found, wanted, space):
            return None if _doubt(found) else space.complete(found.record.configuration)
    return dict(space.default)


def bind_buckets(operator: Operator, form: Form, spec: Any, sizes: Sizes, target: Target) -> None:
    """Build, to travel, the libraries of every bucket of sizes: a compiled folder holds them all.

    `sizes` are those of one call: their names count. Without records there is the default alone.
    """
    if form.lower is None or form.tuning is None or not known()[1]:
        return
    names = list(sizes)
    for at in itertools.product(_BUCKETS, repeat=len(names)):
        found = dict(zip(names, at))
        if found.get("tq", 0) <= found.get("tk", 0):
            chosen, _ = configuration(operator, form, spec, found, target)
            launch.load_or_build(operator.name, form, spec, chosen, target)
            launch.serves(operator.name, form, spec, chosen, found)


def describe(found: Found) -> str:
    """Return how a record was found and whose it is, as reports show it."""
    kind = "" if found.record.source == "measured" else ", ranked by its code"
    return f"{found.how} record ({found.origin}{kind})"


def explain(
    operator: Operator, form: Form, spec: Any, sizes: Sizes, target: Target, threads: int, check: bool = True
) -> list[tuple[Found, str]]:
    """Return the records that fit, best first, each with why it cannot be used, or "".

    Imported ones, and those made with another minor version of a tool, are checked on this device before
    their first use, in a process of their own; without `check`, one that was not yet says so.
    """
    from .tuning import wanted

    store, records = known()
    if not records:
        return []
    about = wanted(operator, form, spec, sizes, target, threads)
    if about is None:
        return []
    answers = []
    for found in look_up(about[0], records):
        problem = _refusal(found, about[0], about[1])
        if not problem and _doubt(found):
            problem = _checked(store, found, operator, form, spec, sizes, target, threads, check)
        answers.append((found, problem))
        if not problem and check:
            break
    return answers


def _refusal(found: Found, wanted: Wanted, space: Space) -> str:
    part = found.record.configuration
    if part.keys() - {axis.name for axis in space.axes}:
        return "it names axes that the space does not have"
    return space.refusal(space.complete(part))


def _doubt(found: Found) -> str:
    """Return why a record has to be checked before use, or ""."""
    from .tuning import versions

    if found.origin == "imported":
        return "imported"
    return stale(found.record, versions())


def _checked(
    store: RecordStore, found: Found, operator: Operator, form: Form, spec: Any, sizes: Sizes, target: Target,
    threads: int, check: bool,
) -> str:  # fmt: skip
    from .tuning import ChildEvaluator, problem_of, tools

    about = f"{tools()} {spec.key()}"
    known = store.is_verified(found.record, about)
    if known is None and not check:
        return f"not checked on this device yet ({_doubt(found)})"
    if known is None:
        problem = problem_of(operator, spec, sizes, target, threads)
        if problem is None:
            return "there is nothing to tune"
        space = form.space(spec, target)
        assert isinstance(space, Space)
        with ChildEvaluator() as evaluator:
            wrong = evaluator.check(
                problem, space.of_phase(found.record.phase).complete(found.record.configuration)
            )
        known = not wrong
        store.mark(found.record, about, known)
    return "" if known else "its results are wrong on this device"
