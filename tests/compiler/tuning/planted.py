"""Real kernels that are made wrong on purpose: each store and each loop of their code, changed one at a time.

Child processes import this file by name: `PROVIDER` is what their requests carry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from edgeformer.compiler.operator import Form, Operator
from edgeformer.compiler.space import Axis, Space
from edgeformer.compiler.target import Target
from edgeformer.runtime import registry

PROVIDER = "planted:operators"
MOST = 4096  # changes of one function, at most


def operators() -> dict[str, Operator]:
    """Return the operators with an axis more: `planted` is the number of a change, 0 is none."""
    return {name: _planted(operator) for name, operator in registry.tunable().items()}


def broken() -> dict[str, Operator]:
    """Return the operators with the same spaces; every kernel but the default's leaves its last store out."""
    found = {}
    for name, operator in registry.tunable().items():
        form = next(f for f in operator.forms if f.tuning)

        def lower(
            spec: Any, configuration: Mapping[str, Any], target: Target, form: Form = form
        ) -> list[Any]:
            assert form.lower is not None
            functions = form.lower(spec, configuration, target)
            if configuration == form.space(spec, target)[0]:
                return functions
            return [changed(function, changes(function) - 1) for function in functions]

        forms = (dataclasses.replace(form, lower=lower),)
        found[name] = Operator(name, operator.spec_type, operator.reference, forms)
    return found


def _planted(operator: Operator) -> Operator:
    form = next(f for f in operator.forms if f.tuning)
    lower = form.lower
    assert lower is not None

    def space(spec: Any, target: Target) -> Space:
        given = form.space(spec, target)
        assert isinstance(given, Space)
        axes = [dataclasses.replace(axis, values=axis.values[:1]) for axis in given.axes]
        return Space((*axes, Axis("planted", tuple(range(MOST)))))

    def lowered(spec: Any, configuration: Mapping[str, Any], target: Target) -> list[Any]:
        number = configuration["planted"]
        functions = lower(spec, configuration, target)
        return [changed(function, number) if number else function for function in functions]

    changed_form: Form = dataclasses.replace(form, space=space, lower=lowered)
    return Operator(operator.name, operator.spec_type, operator.reference, (changed_form,))


def changes(function: Any) -> int:
    """Return how many changes there are of a function."""
    change = _Change(0)
    change.visit(function.body)
    return change.seen


def changed(function: Any, number: int) -> Any:
    """Return the function with change `number`, counted from 1, or itself when it has fewer."""
    return function.with_body(_Change(number).visit(function.body))


class _Change:
    """Counts the possible changes in order of the code, and makes one of them.

    A store is left out, or stores twice the value; a loop leaves out its last round; a condition is turned.
    """

    def __init__(self, number: int) -> None:
        self.number, self.seen = number, 0

    def _now(self) -> bool:
        self.seen += 1
        return self.seen == self.number

    def visit(self, s: Any) -> Any:
        from tvm import tirx

        if isinstance(s, tirx.SeqStmt):
            return tirx.SeqStmt([self.visit(one) for one in s.seq])
        if isinstance(s, tirx.BufferStore):
            if self._now():
                return tirx.Evaluate(tirx.const(0, "int32"))
            if self._now():
                value: Any = s.value
                return tirx.BufferStore(s.buffer, value + value, s.indices)
            return s
        if isinstance(s, tirx.For):
            extent: Any = s.extent
            extent = extent - 1 if self._now() else extent
            rest = (s.thread_binding, s.annotations)
            return tirx.For(s.loop_var, s.min, extent, s.kind, self.visit(s.body), *rest)
        if isinstance(s, tirx.IfThenElse):
            condition = tirx.Not(s.condition) if self._now() else s.condition
            other = None if s.else_case is None else self.visit(s.else_case)
            return tirx.IfThenElse(condition, self.visit(s.then_case), other)
        if isinstance(s, tirx.While):
            return tirx.While(s.condition, self.visit(s.body))
        if isinstance(s, tirx.AttrStmt):
            return tirx.AttrStmt(s.node, s.attr_key, s.value, self.visit(s.body))
        return s


def count(request: Any) -> int:
    """Return how many changes the functions of a request's phase have (in a child: this needs TVM)."""
    operator = operators()[request.operator]
    form = operator.forms[0]
    assert form.tuning is not None and form.lower is not None
    wanted = form.tuning.functions(request.spec, form.tuning.phase(request.spec, request.sizes))
    functions = form.lower(request.spec, form.space(request.spec, request.target)[0], request.target)
    return max(changes(f) for f in functions if str(f.attrs["global_symbol"]) in wanted)


def differs(request: Any) -> str:
    """Say where a changed kernel's results differ from the unchanged one's, on more inputs than the tuner's.

    This is the judge of changes that the tuner takes for right: a change may do nothing.
    """
    from edgeformer.runtime.trial import Bench

    bench = Bench(request)
    changed_call = bench._build(dict(request.configurations[0]))[0]
    right = bench._build(dict(bench.default))[0]
    return _differs(bench, right, changed_call)


def _differs(bench: Any, right: Any, other: Any) -> str:
    if bench.operator.name == "quant_matmul":
        from edgeformer.kernels.quant_matmul.tuning import _case

        packed = _case(bench.spec, bench.target).packed
        many = bench.phase == "many"
        rows = (1,) if bench.phase == "gemv" else ((32, 37, 64, 95) if many else (2, 3, 7, 15))
        for seed in range(8):
            for m in rows:
                x = torch.randn(m, bench.spec.k, generator=torch.Generator().manual_seed(seed))
                x = x * 10.0 ** (seed - 4)
                if problem := _compare(right(x, packed, None, None), other(x, packed, None, None)):
                    return f"{m} rows, seed {seed}: {problem}"
        return ""
    from edgeformer.kernels.attention.tuning import inputs

    for seed in range(10, 16):
        for tq, tk in ((1, 33), (2, 70), (4, 200)) if bench.phase == "decode" else ((17, 40), (40, 90)):
            q, k, v, options = inputs(bench.spec, tq, tk, seed)
            if problem := _compare(right(q, k, v, **options)[0], other(q, k, v, **options)[0]):
                return f"{tq} queries, {tk} keys, seed {seed}: {problem}"
    return ""


def _compare(right: torch.Tensor, other: torch.Tensor) -> str:
    if not torch.isfinite(other).all():
        return "not every result is a number"
    error = float((right.double() - other.double()).norm() / right.double().norm().clamp_min(1e-300))
    return "" if error < 1e-4 else f"relative error {error:.1e}"
