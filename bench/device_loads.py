"""Where the work-items of a group read: the addresses of a function's wide loads, lane by lane."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

_BINARY: dict[str, Callable[[int, int], int]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Min": min,
    "Max": max,
    "FloorDiv": operator.floordiv,
    "FloorMod": operator.mod,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
_CALLS: dict[str, Callable[..., int]] = {
    "tirx.shift_right": operator.rshift,
    "tirx.shift_left": operator.lshift,
    "tirx.bitwise_and": operator.and_,
    "tirx.bitwise_or": operator.or_,
    "tirx.truncdiv": operator.floordiv,
    "tirx.truncmod": operator.mod,
}


class Loads:
    """The loads of 16 bytes from a function's buffers, by the buffer's name."""

    def __init__(self, function: Any) -> None:
        self._bound: dict[Any, Any] = {}
        self._lane: Any = None
        self.by_buffer: dict[str, list[Any]] = {}
        names = {str(parameter.name) for parameter in function.params}
        for node in _nodes(function.body):
            self._visit(node, names)

    def _visit(self, node: Any, names: set[str]) -> None:
        kind = type(node).__name__
        if kind == "AttrStmt" and node.attr_key == "thread_extent" and node.node.thread_tag == "threadIdx.x":
            self._lane = node.node.var
        elif kind in ("Bind", "LetStmt"):
            self._bound[node.var] = node.value
        elif kind == "BufferLoad" and str(node.buffer.dtype).endswith("32x4"):
            name = str(node.buffer.name)
            if name in names:
                self.by_buffer.setdefault(name, []).append(node.indices[0])

    def run_of(self, name: str, lanes: int, seed: int = 0) -> int:
        """Return the most work-items of which each reads the vector behind its neighbour's, in every load.

        The least over the loads of the buffer; loads that all work-items share (one address) do not count.
        """
        runs = []
        for index in self.by_buffer.get(name, []):
            found = [self._value(index, lane, random.Random(seed), {}) for lane in range(lanes)]
            if len(set(found)) > 1:
                runs.append(_shortest_run(found))
        return min(runs, default=0)

    def _value(self, node: Any, lane: int, draw: random.Random, known: dict[Any, int]) -> int:
        """Evaluate an index; what is unknown (sizes, group, loop) is a number that all lanes share."""
        kind = type(node).__name__
        if kind == "IntImm":
            return int(node.value)
        if kind in ("Var", "SizeVar"):
            if self._lane is not None and node.same_as(self._lane):
                return lane
            if node in self._bound:
                if node not in known:
                    known[node] = self._value(self._bound[node], lane, draw, known)
                return known[node]
            return known.setdefault(node, 0)
        if kind in _BINARY:
            return int(_BINARY[kind](*(self._value(x, lane, draw, known) for x in (node.a, node.b))))
        if kind == "Cast":
            return self._value(node.value, lane, draw, known)
        if kind == "Select":
            chosen = node.true_value if self._value(node.condition, lane, draw, known) else node.false_value
            return self._value(chosen, lane, draw, known)
        if kind in ("And", "Or"):
            return int(all(self._value(x, lane, draw, known) for x in (node.a, node.b)))
        if kind == "Call" and node.op.name in _CALLS:
            return _CALLS[node.op.name](*(self._value(x, lane, draw, known) for x in node.args))
        return 0  # a loaded number: the same for all lanes


_CHILDREN = (
    "seq", "value", "body", "min", "extent", "condition", "then_case", "else_case", "true_value",
    "false_value", "indices", "a", "b", "args", "vectors", "base",
)  # fmt: skip


def _nodes(root: Any) -> Iterator[Any]:
    """Yield every statement and expression below `root`, which TVM has no visitor for in Python."""
    waiting = [root]
    while waiting:
        node = waiting.pop()
        yield node
        for name in _CHILDREN:
            child = getattr(node, name, None)
            if child is None or isinstance(child, int | float | str):
                continue
            if hasattr(child, "__iter__") or hasattr(child, "__len__"):
                waiting.extend(child)
            else:
                waiting.append(child)


def _shortest_run(places: list[int]) -> int:
    """Return the shortest stretch of neighbours before a jump (all lanes, when there is none)."""
    runs, length = [], 1
    for before, after in pairwise(places):
        if after == before + 1:
            length += 1
            continue
        runs.append(length)
        length = 1
    return min(runs) if runs else len(places)
