"""Dispatch: a pure choice with reasons, fallbacks that are reported, requests that fail loudly."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from edgeformer.compiler.errors import BuildError, DeclinedError, TargetError
from edgeformer.compiler.operator import Declined, Form, Operator, accept_all, single_configuration
from edgeformer.compiler.target import Target, detect
from edgeformer.runtime import dispatch, launch
from edgeformer.runtime.registry import operators


@dataclass(frozen=True)
class Size:
    """A problem of some size."""

    n: int

    def key(self) -> str:
        """One word."""
        return f"size{self.n}"


def form(name: str, largest: int, bind: Any = None) -> Form:
    def decide(spec: Size, target: Target) -> Declined | None:
        return Declined(f"at most {largest}") if spec.n > largest else None

    return Form(name, "torch", decide, single_configuration, bind or (lambda *args: lambda: name))


def broken(*args: Any) -> Any:
    raise BuildError("the linker is on holiday")


FAST, WIDE = form("fast", 10), form("wide", 100)
LAST = Form("reference", "torch", accept_all, single_configuration, lambda *args: lambda: "reference")
OPERATOR = Operator("sizes", Size, lambda: None, (FAST, WIDE, LAST))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("_bound", "_choices"):
        monkeypatch.setattr(dispatch, name, {})
    monkeypatch.setattr(launch, "_warned", set())
    yield
    dispatch.use_target(None)


@pytest.mark.parametrize(("n", "name", "declined"), [(1, "fast", 0), (50, "wide", 1), (500, "reference", 2)])
def test_the_first_form_that_accepts(n: int, name: str, declined: int) -> None:
    chosen, choice = dispatch.choose(OPERATOR, Size(n), detect())
    assert chosen.name == choice.form == name and choice.spec == f"size{n}" and choice.record == "default"
    assert choice.declined == (("fast", "at most 10"), ("wide", "at most 100"))[:declined]
    assert dispatch.bound(OPERATOR, Size(n))() == name


def test_choosing_changes_nothing() -> None:
    first = dispatch.choose(OPERATOR, Size(50), detect())
    assert dispatch.choose(OPERATOR, Size(50), detect()) == first and dispatch.choices() == []


def test_a_form_asked_for_by_name() -> None:
    assert dispatch.bound(OPERATOR, Size(1), "wide")() == "wide"
    assert dispatch.bound(OPERATOR, Size(1))() == "fast"  # the request was for one call only
    with pytest.raises(DeclinedError, match=r"sizes size50 on .*fast: at most 10"):
        dispatch.bound(OPERATOR, Size(50), "fast")
    with pytest.raises(DeclinedError, match="no such form; forms: fast, wide, reference"):
        dispatch.bound(OPERATOR, Size(1), "slow")


def test_no_form_at_all_gives_every_reason() -> None:
    operator = dataclasses.replace(OPERATOR, forms=(FAST, WIDE))
    with pytest.raises(DeclinedError, match="fast: at most 10; wide: at most 100"):
        dispatch.bound(operator, Size(500))


def test_a_form_that_cannot_be_built_is_replaced_and_reported() -> None:
    operator = dataclasses.replace(
        OPERATOR, forms=(form("fast", 10, broken), form("wide", 100, broken), LAST)
    )
    with pytest.warns(RuntimeWarning, match="sizes runs its slower form: the linker is on holiday"):
        assert dispatch.bound(operator, Size(1))() == "reference"
    (choice,) = dispatch.choices()
    reason = "not built: the linker is on holiday"
    assert choice.form == "reference" and choice.declined == (("fast", reason), ("wide", reason))


def test_a_request_that_cannot_be_built_fails() -> None:
    operator = dataclasses.replace(OPERATOR, forms=(form("fast", 10, broken), LAST))
    with pytest.raises(BuildError, match="holiday"):
        dispatch.bound(operator, Size(1), "fast")
    with pytest.raises(BuildError, match="holiday"):
        dispatch.bound(dataclasses.replace(OPERATOR, forms=(form("fast", 10, broken),)), Size(1))


def test_other_errors_are_not_swallowed() -> None:
    def bug(*args: Any) -> Any:
        raise ZeroDivisionError

    operator = dataclasses.replace(OPERATOR, forms=(form("fast", 10, bug), LAST))
    with pytest.raises(ZeroDivisionError):
        dispatch.bound(operator, Size(1))


def test_binding_happens_once() -> None:
    calls: list[int] = []

    def bind(spec: Size, *args: Any) -> Any:
        calls.append(spec.n)
        return lambda: spec.n

    operator = dataclasses.replace(OPERATOR, forms=(form("fast", 10, bind),))
    assert [dispatch.bound(operator, Size(n))() for n in (1, 1, 2, 1)] == [1, 1, 2, 1] and calls == [1, 2]


def test_another_target_binds_again_and_one_that_cannot_run_is_refused() -> None:
    seen: list[str] = []

    def bind(spec: Size, configuration: Any, target: Target, library: Any) -> Any:
        seen.append(target.isa)
        return lambda: target.isa

    operator = dataclasses.replace(OPERATOR, forms=(form("fast", 10, bind),))
    before = dispatch.generation()
    dispatch.bound(operator, Size(1))
    dispatch.use_target(detect().with_isa("portable"))
    assert dispatch.generation() > before and dispatch.current_target().isa == "portable"
    assert dispatch.bound(operator, Size(1))() == "portable" and seen == [detect().isa, "portable"]
    other = "aarch64" if detect().arch == "x86_64" else "x86_64"
    with pytest.raises(TargetError, match=f"needs architecture {other}"):
        dispatch.use_target(dataclasses.replace(detect(), arch=other))
    assert dispatch.current_target().isa == "portable"


@pytest.mark.parametrize("name", operators())
def test_every_operator_ends_in_its_reference(name: str) -> None:
    operator = operators()[name]
    assert operator.name == name and len({f.name for f in operator.forms}) == len(operator.forms)
    assert operator.forms[-1].name == "reference" and operator.forms[-1].lower is None
    assert operator.form("reference") is operator.forms[-1]
    with pytest.raises(KeyError, match=f"{name} has no form 'nothing'; forms: "):
        operator.form("nothing")
