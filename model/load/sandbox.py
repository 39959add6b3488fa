"""The sandbox that chat templates run in: Jinja's immutable one, with bounds on steps, time and memory."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 1 << 16  # characters of a template
MAX_CHARACTERS = 4 << 20  # of a text: a million tokens
MAX_ITEMS = 1 << 20  # of a structure, counted as often as it would be printed
MAX_STEPS = 1 << 18  # turns of loops, calls, filters
MAX_SECONDS = 0.8  # of CPU time
MAX_PRODUCT = 32 << 20  # characters that padding, joining or replacing may make
_GROWS = frozenset(
    {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "batch", "slice", "tojson",
     "round", "format", "replace", "join", "truncate", "to_bytes", "translate", "urlize", "xmlattr"}
)  # fmt: skip
_WIDE_FORMAT = re.compile(r"\d{5}|\*|\{[^{}]*\{")  # a width of 10,000 or more, or one that is computed
_EXTENSIONS: list[str | type[Extension]] = [loopcontrols]


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment for one rendering; passing a bound is a SecurityError."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=_EXTENSIONS, finalize=self._written)
        self._steps = self._characters = 0
        self._end = time.thread_time() + MAX_SECONDS
        for name in ("lipsum", "cycler", "joiner"):
            self.globals.pop(name, None)
        self.filters = {name: self._guarded(name, call) for name, call in self.filters.items()}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > MAX_SOURCE:
            raise SecurityError(f"a template of {len(source)} characters")
        tree = super()._parse(source, name, filename)
        return _Instrument(self).visit(tree)

    def add_filter(self, name: str, call: Callable[..., Any]) -> None:
        """Add or replace a filter, with the sandbox's bounds around it."""
        self.filters[name] = self._guarded(name, call)

    def tick(self, characters: int = 0) -> None:
        """Count a step, and text that it writes."""
        self._steps += 1
        self._characters += characters
        if self._characters > MAX_CHARACTERS:
            raise SecurityError(f"more than {MAX_CHARACTERS} characters")
        if self._steps > MAX_STEPS or time.thread_time() > self._end:
            raise SecurityError("it takes too long")

    def held(self, value: Any) -> Any:
        """Return a value that is not too large to keep."""
        self.tick()
        self._weigh(value)
        return value

    def concatenated(self, items: list[Any]) -> str:
        """Return texts one behind the other."""
        self.held(items)
        return self.held("".join(map(str, items)))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute left operator right, where the result cannot fill the memory."""
        self.tick()
        sizes = (
            [len(v) if isinstance(v, (str, list, tuple)) else abs(v) for v in (left, right)]
            if (operator in ("*", "**"))
            else [0, 0]
        )
        if max(sizes) > 1024 if operator == "**" else sizes[0] * sizes[1] > MAX_CHARACTERS:
            raise SecurityError(f"{operator!r} of such large operands")
        if operator == "%" and isinstance(left, str):
            self._check_growth("format", left, (right,))
        return self.held(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls."""
        if getattr(__obj, "__self__", None) is __self:  # our own steps
            return __obj(*args)
        given = [*args, *(v for k, v in kwargs.items() if k not in ("_loop_vars", "_block_vars"))]
        __self.held(given)
        name = getattr(__obj, "__name__", "")
        if name in _GROWS or name == "format_map":
            method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
            __self._check_growth(name, getattr(method, "__self__", ""), given)
        return __self.held(super().call(__context, __obj, *args, **kwargs))

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return obj[argument]."""
        self.tick()
        return super().getitem(obj, argument)

    def _guarded(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter that counts as a step and refuses to make something too large."""
        skipped = 1 if getattr(call, "jinja_pass_arg", None) is not None else 0

        @functools.wraps(call)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            values = [*args[skipped:], *kwargs.values()]
            self.held(values)
            if name in _GROWS and values:
                self._check_growth(name, values[0], values[1:])
            result = call(*args, **kwargs)
            return self.held(result) if isinstance(result, (str, list, tuple, dict)) else result

        return guarded

    def _check_growth(self, name: str, subject: Any, arguments: Any) -> None:
        size = len(subject) if hasattr(subject, "__len__") else 1
        factors = [1]
        for value in arguments:
            if isinstance(value, (str, list, tuple, dict)):
                factors.append(len(value))
            elif isinstance(value, (int, float)):
                factors.append(int(min(abs(value), 1e18)) if value == value else 1)
        if (size + 1) * max(factors) > MAX_PRODUCT:
            raise SecurityError(f"{name!r} of such large operands")
        if name.startswith("format") and isinstance(subject, str) and _WIDE_FORMAT.search(subject):
            raise SecurityError("a format of such a width")

    def _weigh(self, value: Any) -> None:
        """Raise SecurityError for a text or structure that is too large; shared parts count every time."""
        items = characters = 0
        waiting = [value]
        while waiting:
            value = waiting.pop()
            items += 1
            if isinstance(value, (str, bytes)):
                characters += len(value)
            elif isinstance(value, (list, tuple, set, frozenset)):
                waiting.extend(value)
            elif isinstance(value, dict):
                waiting.extend(value.keys())
                waiting.extend(value.values())
            if items + len(waiting) > MAX_ITEMS or characters > MAX_CHARACTERS:
                raise SecurityError("a text or list of such a size")
            if not items % 4096:
                self.tick()

    def _written(self, value: Any) -> Any:
        """Count what an expression writes."""
        self.held(value)
        if isinstance(value, str):
            self.tick(len(value))
        return value


class _Instrument(NodeTransformer):
    """Makes loops, macros, structures and joined texts of a template call the sandbox."""

    def __init__(self, environment: Sandbox) -> None:
        self.environment = environment

    def _call(self, name: str, argument: nodes.Expr, line: int) -> nodes.Call:
        made = nodes.Call(nodes.EnvironmentAttribute(name), [argument], [], None, None)
        return made.set_lineno(line).set_environment(self.environment)  # pyright: ignore[reportReturnType]

    def _body(self, node: Any) -> Any:
        self.generic_visit(node)
        length = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        step = nodes.ExprStmt(self._call("tick", nodes.Const(length), node.lineno))
        node.body.insert(0, step.set_lineno(node.lineno).set_environment(self.environment))
        return node

    visit_For = visit_Macro = visit_CallBlock = _body

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("concatenated", nodes.List(node.nodes), node.lineno)

    def _structure(self, node: Any) -> Any:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":  # {% set a, b = ... %}
            return node
        return self._call("held", node, node.lineno)

    visit_List = visit_Tuple = visit_Dict = _structure
