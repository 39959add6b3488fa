"""quant_matmul's machine code: dot instructions fill the hot loop, and next to nothing there is spilled."""

from __future__ import annotations

import re
from typing import Any

import pytest

from edgeformer.compiler.backends import tvm_llvm
from edgeformer.compiler.target import Target
from edgeformer.kernels.quant_matmul import TVM_CPU, QuantMatmulSpec, WeightFormat

FORMATS = {
    "int4": WeightFormat.int4(),
    "int4-minimum": WeightFormat.int4(zero="minimum"),
    "int8": WeightFormat.int8(),
}


def assembly(target: Target, weight: WeightFormat, function: str, **options: Any) -> str:
    spec = QuantMatmulSpec(**{"n": 3072, "k": 576, "weight": weight} | options)
    assert TVM_CPU.lower is not None
    functions = TVM_CPU.lower(spec, TVM_CPU.space(spec, target)[0], target)
    chosen = [f for f in functions if str(f.attrs["global_symbol"]) == function]
    return tvm_llvm.inspect(chosen, target).assembly


def blocks(text: str) -> tuple[list[list[str]], list[list[str]]]:
    """Return the instructions between labels and jumps, and those blocks that jump to their own start."""
    found: list[list[str]] = [[]]
    loops: list[list[str]] = []
    label = ""
    for line in text.splitlines():
        start = re.match(r"(\.LBB\w+|\w+):", line)
        if start:
            label = start.group(1)
            found.append([])
        elif line.startswith("\t") and not line.startswith("\t."):
            found[-1].append(line)
            jump = re.match(r"\tj\w+\s+(\S+)", line)
            if jump:
                if label and jump.group(1) == label:
                    loops.append(found[-1])
                label = ""
                found.append([])
    return found, loops


def dot_instruction(target: str, fmt: str, function: str) -> str:
    if target == "znver5":
        return "vpdpbusd"
    return "vpmaddwd" if fmt == "int8" and function == "gemm" else "vpmaddubsw"


@pytest.mark.parametrize("function", ["gemv", "rows", "gemm"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("target", ["znver5", "znver3"])
def test_hot_loop(target: str, fmt: str, function: str) -> None:
    mnemonic = dot_instruction(target, fmt, function)
    dots = lambda block: count(block, mnemonic)  # noqa: E731
    found, loops = blocks(assembly(Target.parse(target), FORMATS[fmt], function))
    stepping = [block for block in loops if dots(block) >= 8]
    # A loop over the steps of a group must not touch the stack. Where a whole group is one line of code
    # (GEMV), some values may be saved around it. Two rows of a whole block are eight of AVX2's 16 registers,
    # a step's codes four to eight: some accumulators stay in L1, and it is still the faster tile.
    hot = max(stepping or found, key=dots)
    assert dots(hot) >= 8, f"no loop holds {mnemonic}"
    assert stepping or function == "gemv", "the steps of a group are no loop of their own"
    stack = [line for line in hot if "(%rsp" in line]
    share = {"gemv": 16, "rows": 8 if target == "znver3" else 0}.get(function, 0)
    few = len(hot) // share if share else 0
    assert len(stack) <= few, f"{len(stack)} of {len(hot)} instructions use the stack: {stack[:4]}"


@pytest.mark.parametrize("options", [{}, {"k": 4096}, {"epilogue": "silu_pair"}], ids=str)
@pytest.mark.parametrize("fmt", ["int4", "bfloat16"])
def test_matrix_unit_loop(fmt: str, options: dict[str, Any]) -> None:
    """Four products a step on four loads (two on three for the last 16 rows), no vector or tile saved."""
    weight = FORMATS.get(fmt) or WeightFormat.float(fmt)
    text = assembly(Target.parse("sapphirerapids"), weight, "gemm", activation="bfloat16", **options)
    found, loops = blocks(text)
    hot = [loop for loop in loops if count(loop, "tdpbf16ps")]
    assert sum(count(b, "tdpbf16ps") for b in found) == sum(count(b, "tdpbf16ps") for b in hot)
    assert {count(loop, "tileloadd") / count(loop, "tdpbf16ps") for loop in hot} == {1, 3 / 2}
    for loop in hot:
        assert not any(re.search(r"[xyz]mm|call|tile.*%rsp", line) for line in loop), "\n".join(loop)
    for once in ("ldtilecfg", "tilerelease"):
        assert sum(count(block, once) for block in found) == 1


def count(block: list[str], mnemonic: str) -> int:
    return sum(mnemonic in line for line in block)
