"""The words that kernels are written in: an Operator has Forms; a Form declines, or is built and bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from .target import Target

Configuration = Mapping[str, int | str | bool]


class Spec(Protocol):
    """A frozen problem: shapes, types and options that are known when a kernel is built."""

    def key(self) -> str:
        """One line that names the problem completely."""
        ...


class Library(Protocol):
    """A built and loaded kernel library."""

    def function(self, name: str) -> Callable[..., Any]:
        """Return the native function `name`."""
        ...


@dataclass(frozen=True)
class Declined:
    """A form's answer when it does not take a problem."""

    reason: str


@dataclass(frozen=True)
class Form:
    """One way to compute an operator.

    `decide(spec, target)` returns None to accept or Declined. `space(spec, target)` lists the
    configurations, the default first. `lower(spec, configuration, target)` returns what the back end
    builds. `bind(spec, configuration, target, library)` returns the callable that the runtime calls;
    `library` is None for a form that needs no tool chain. `sources` are package-relative folders or
    files whose text is part of the artifact's key.
    """

    name: str
    backend: str
    decide: Callable[[Any, Target], Declined | None]
    space: Callable[[Any, Target], list[dict[str, Any]]]
    bind: Callable[[Any, Configuration, Target, Any], Callable[..., Any]]
    lower: Callable[[Any, Configuration, Target], Any] | None = None
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Operator:
    """What is computed: a name, its spec type, the reference that defines right, and its forms in order."""

    name: str
    spec_type: type
    reference: Callable[..., Any]
    forms: tuple[Form, ...] = field(default=())

    def form(self, name: str) -> Form:
        """Return the form `name`, or raise KeyError with the names that exist."""
        for form in self.forms:
            if form.name == name:
                return form
        raise KeyError(f"{self.name} has no form {name!r}; forms: {', '.join(f.name for f in self.forms)}")


def accept_all(spec: Any, target: Target) -> Declined | None:
    """Accept every problem (the reference form)."""
    return None


def single_configuration(spec: Any, target: Target) -> list[dict[str, Any]]:
    """Return the one empty configuration of a form with nothing to tune."""
    return [{}]


def reference_form(call: Callable[..., Any]) -> Form:
    """Wrap plain PyTorch as a form that runs everywhere; `call(spec, ...)` takes the runtime's arguments."""

    def bind(spec: Any, configuration: Configuration, target: Target, library: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: call(spec, *args, **kwargs)

    return Form("reference", "torch", accept_all, single_configuration, bind)
