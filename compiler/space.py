"""A tuning space: a table of axes with named constraints, read as a sequence of configurations."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

Value = int | str | bool


@dataclass(frozen=True)
class Axis:
    """One parameter: its values, the default first, and the phases of the kernel that it changes.

    Without phases it changes all of them. A value never changes results, only the time they take.
    """

    name: str
    values: tuple[Value, ...]
    phases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Constraint:
    """A named condition on configurations; the name is what a refusal says."""

    name: str
    holds: Callable[[Mapping[str, Any]], bool]


@dataclass(frozen=True)
class Space(Sequence[dict[str, Any]]):
    """Every configuration that the constraints allow, the default (each axis's first value) first.

    `version` goes up when an axis keeps its name and changes its meaning. Raises ValueError for a default
    that a constraint refuses.
    """

    axes: tuple[Axis, ...]
    constraints: tuple[Constraint, ...] = ()
    version: int = 1

    def __post_init__(self) -> None:
        if problem := self.refusal(self.default):
            raise ValueError(f"the default configuration is no member of its space: {problem}")

    @property
    def default(self) -> dict[str, Any]:
        """The configuration that runs untuned."""
        return {axis.name: axis.values[0] for axis in self.axes}

    @property
    def signature(self) -> str:
        """What a record's space must equal: the version and the axes' names."""
        return f"{self.version}:{','.join(sorted(axis.name for axis in self.axes))}"

    def refusal(self, configuration: Mapping[str, Any]) -> str:
        """Return why `configuration` is no member, or ""."""
        names = {axis.name for axis in self.axes}
        if configuration.keys() != names:
            return f"its axes are {sorted(configuration)}, not {sorted(names)}"
        for axis in self.axes:
            value = configuration[axis.name]
            if not any(type(value) is type(known) and value == known for known in axis.values):
                return f"{axis.name}={value!r} is not one of {list(axis.values)}"
        for constraint in self.constraints:
            if not constraint.holds(configuration):
                return constraint.name
        return ""

    def of_phase(self, phase: str) -> Space:
        """Return the space of one phase: the axes that do not change it keep their default."""
        axes = (
            axis if not axis.phases or phase in axis.phases else replace(axis, values=axis.values[:1])
            for axis in self.axes
        )
        return replace(self, axes=tuple(axes))

    def essential(self, configuration: Mapping[str, Any]) -> dict[str, Any]:
        """Return the part of a member that a record keeps: the axes that this space leaves open."""
        return {axis.name: configuration[axis.name] for axis in self.axes if len(axis.values) > 1}

    def complete(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """Return a member's `essential` part with the defaults of the other axes."""
        return self.default | dict(part)

    def draw(self, generator: random.Random) -> dict[str, Any]:
        """Return a random member."""
        for _ in range(1000):
            found = {axis.name: generator.choice(axis.values) for axis in self.axes}
            if not self.refusal(found):
                return found
        return self.default

    def mutate(self, configuration: Mapping[str, Any], generator: random.Random) -> dict[str, Any]:
        """Return a member that differs from `configuration` in one or two axes, mostly by one step."""
        open_axes = [axis for axis in self.axes if len(axis.values) > 1]
        for _ in range(1000):
            found = dict(configuration)
            for axis in generator.sample(open_axes, min(len(open_axes), generator.choice((1, 1, 2)))):
                ordered = sorted(axis.values, key=lambda v: (str(type(v)), v))
                at = ordered.index(found[axis.name])
                near = [ordered[i] for i in (at - 1, at + 1) if 0 <= i < len(ordered)]
                found[axis.name] = generator.choice(near if generator.random() < 0.7 else ordered)
            if found != configuration and not self.refusal(found):
                return found
        return dict(configuration)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        names = [axis.name for axis in self.axes]
        for values in itertools.product(*(axis.values for axis in self.axes)):
            found = dict(zip(names, values))
            if all(constraint.holds(found) for constraint in self.constraints):
                yield found

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if index == 0:
            return self.default
        return list(self)[index]
