"""quant_matmul's machine code: the dot instruction runs in the hot loop, and next to nothing there goes to the stack."""

from __future__ import annotations

import re

import pytest

from edgeformer.compiler.backends import tvm_llvm
from edgeformer.compiler.target import Target
from edgeformer.kernels.quant_matmul import TVM_CPU, QuantMatmulSpec, WeightFormat

FORMATS = {
    "int4": WeightFormat.int4(),
    "int4-minimum": WeightFormat.int4(zero="minimum"),
    "int8": WeightFormat.int8(),
}
DOTS = {"znver5": "vpdpbusd", "znver3": "vpmaddubsw|vpmaddwd"}


def assembly(target: Target, weight: WeightFormat, function: str) -> str:
    spec = QuantMatmulSpec(3072, 576, weight)
    functions = TVM_CPU.lower(spec, TVM_CPU.space(spec, target)[0], target)
    chosen = [f for f in functions if str(f.attrs["global_symbol"]) == function]
    return tvm_llvm.inspect(chosen, target).assembly


def innermost_loops(text: str) -> list[list[str]]:
    """The instructions of every loop that holds no other loop; jumps to one label make one loop."""
    lines = text.splitlines()
    labels = {m.group(1): i for i, line in enumerate(lines) if (m := re.match(r"(\.LBB\w+):", line))}
    ends: dict[int, int] = {}
    for i, line in enumerate(lines):
        jump = re.search(r"\sj\w+\s+(\.LBB\w+)", line)
        if jump and labels[jump.group(1)] < i:
            ends[labels[jump.group(1)]] = i
    inner = [(a, b) for a, b in ends.items() if not any(a < c <= b for c in ends)]
    return [[x for x in lines[a : b + 1] if x.startswith("\t") and not x.startswith("\t.")] for a, b in inner]


@pytest.mark.parametrize("function", ["gemv", "rows", "gemm"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("target", DOTS)
def test_hot_loop(target: str, fmt: str, function: str) -> None:
    dots = lambda loop: sum(bool(re.search(DOTS[target], line)) for line in loop)  # noqa: E731
    hot = max(innermost_loops(assembly(Target.parse(target), FORMATS[fmt], function)), key=dots)
    assert dots(hot) >= 8, f"no innermost loop holds {DOTS[target]}"
    stack = [line for line in hot if "(%rsp" in line]
    # GEMM's loop has one step: it must not touch the stack. The others' have a whole group in a line,
    # with a few values saved around it.
    few = 0 if function == "gemm" else len(hot) // 16
    assert len(stack) <= few, f"{len(stack)} of {len(hot)} instructions use the stack: {stack[:4]}"
