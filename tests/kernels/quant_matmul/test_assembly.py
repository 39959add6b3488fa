"""quant_matmul's machine code: dot instructions fill the hot loop, and next to nothing there is spilled."""

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


def assembly(target: Target, weight: WeightFormat, function: str) -> str:
    spec = QuantMatmulSpec(3072, 576, weight)
    assert TVM_CPU.lower is not None
    functions = TVM_CPU.lower(spec, TVM_CPU.space(spec, target)[0], target)
    chosen = [f for f in functions if str(f.attrs["global_symbol"]) == function]
    return tvm_llvm.inspect(chosen, target).assembly


def blocks(text: str) -> list[list[str]]:
    """The instructions between labels and jumps: the body of an innermost loop is one such block."""
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if re.match(r"\.LBB\w+:|\w+:", line):
            found.append([])
        elif line.startswith("\t") and not line.startswith("\t."):
            found[-1].append(line)
            if re.match(r"\tj\w+\s", line):
                found.append([])
    return found


def dot_instruction(target: str, fmt: str, function: str) -> str:
    if target == "znver5":
        return "vpdpbusd"
    return "vpmaddwd" if fmt == "int8" and function == "gemm" else "vpmaddubsw"


@pytest.mark.parametrize("function", ["gemv", "rows", "gemm"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("target", ["znver5", "znver3"])
def test_hot_loop(target: str, fmt: str, function: str, request: pytest.FixtureRequest) -> None:
    if target == "znver3" and fmt != "int8" and function == "rows":
        reason = "known flaw: AVX2's small-M block keeps vectors on the stack"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    mnemonic = dot_instruction(target, fmt, function)
    dots = lambda block: sum(mnemonic in line for line in block)  # noqa: E731
    hot = max(blocks(assembly(Target.parse(target), FORMATS[fmt], function)), key=dots)
    assert dots(hot) >= 8, f"no loop holds {mnemonic}"
    stack = [line for line in hot if "(%rsp" in line]
    # A loop over the steps of a group must not touch the stack. Where a whole group is one line of code
    # (GEMV, and few rows with many registers), some values may be saved around it.
    few = 0 if function == "gemm" else len(hot) // 16
    assert len(stack) <= few, f"{len(stack)} of {len(hot)} instructions use the stack: {stack[:4]}"
