"""The words that kernels are written in: an Operator has Forms; a Form declines, or is built and bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


Sizes = Mapping[str, int]  # run-time sizes of one call: rows, queries, context length


class Workload(Protocol):
    """Inputs of one problem at one set of run-time sizes, to time and to check configurations on.

    `nbytes` and `operations` are what one call reads and computes; `arithmetic` names the peak that its
    operations have ("int8", "bfloat16" or "float"). `area` is (address, bytes) of what the calls read, in
    turn: together larger than the last-level cache.
    """

    nbytes: int
    operations: int
    arithmetic: str
    copies: int
    area: tuple[int, int]

    def run(self, call: Callable[..., Any], index: int) -> Any:
        """Call once on copy `index` of the inputs."""
        ...


@dataclass(frozen=True)
class Tuning:
    """What the tuner has to know of a form whose `space` is a Space.

    `phase(spec, sizes)` names the part of the kernels that runs at these sizes; look-up never crosses it.
    `family(spec, target)` is what records must share (types and layout), and the problem's fixed sizes, in
    which they may differ. `functions` are the native functions that a phase calls. `check(spec, sizes,
    target, call, seed)` returns what is wrong with a call's results at sizes around these, or "";
    `workload(spec, sizes, target, cache_bytes)` makes inputs that are larger than that cache. Both are None
    where the form cannot be run without what a model brings.
    """

    phase: Callable[[Any, Sizes], str]
    family: Callable[[Any, Target], tuple[str, dict[str, int]]]
    functions: Callable[[Any, str], tuple[str, ...]]
    workload: Callable[[Any, Sizes, Target, int], Workload] | None = None
    check: Callable[[Any, Sizes, Target, Callable[..., Any], int], str] | None = None


@dataclass(frozen=True)
class Form:
    """One way to compute an operator.

    `decide(spec, target)` returns None to accept or Declined. `space(spec, target)` lists the
    configurations, the default first. `lower(spec, configuration, target)` returns what the back end
    builds. `bind(spec, configuration, target, library)` returns the callable that the runtime calls;
    `library` is None for a form that needs no tool chain. `sources` are package-relative folders or
    files whose text is part of the artifact's key. A form with `tuning` can be tuned. A form on a device
    whose driver compiles it has `verify(spec, configuration, session, library)`: what is wrong with the
    library's results on small problems, or "".
    """

    name: str
    backend: str
    decide: Callable[[Any, Target], Declined | None]
    space: Callable[[Any, Target], Sequence[dict[str, Any]]]
    bind: Callable[[Any, Configuration, Target, Any], Callable[..., Any]]
    lower: Callable[[Any, Configuration, Target], Any] | None = None
    sources: tuple[str, ...] = ()
    tuning: Tuning | None = None
    verify: Callable[[Any, Configuration, Any, Any], str] | None = None


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
