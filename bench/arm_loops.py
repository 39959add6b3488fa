"""Static evidence for Arm: what inner loops are made of, and their cycles by llvm-mca. No speed is claimed.

    python -m edgeformer.bench.arm_loops            # a table in Markdown

Counts are per 128 packed bytes of weights (of the tile of many rows: of its unpacked panel), with the loads
of weights and activations, prefetches and the loop's own instructions. llvm-mca models no memory.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

from ..compiler.backends import tvm_llvm
from ..compiler.errors import UnsupportedError
from ..compiler.target import Target
from ..kernels.quant_matmul import TVM_CPU, QuantMatmulSpec, WeightFormat

_DOTS = {
    "i8mm": ("sdot", "usdot", "smmla", "usmmla"),
    "dotprod": ("sdot",),
    "neon": ("smlal", "smlal2", "smull", "smull2"),
}
_LOADS = ("ldr", "ldp", "ldur", "ld1", "ld1r", "ldrb", "prfm", "prfum")
_UNPACK = ("and", "ushr", "shl", "sshr", "bic", "usra")
_PRODUCTS = {
    "smmla": 32,
    "usmmla": 32,
    "sdot": 16,
    "usdot": 16,
    "smlal": 8,
    "smlal2": 8,
    "smull": 8,
    "smull2": 8,
}
MCA = ("llvm-mca-22", "llvm-mca-21", "llvm-mca-20", "llvm-mca-19")  # older ones lack neoverse-v2
_PIPES = {"neoverse-n1": 2, "neoverse-v2": 4}  # of 128 bits, each of which takes a dot instruction a cycle
# Compiled for, and llvm-mca's model: neoverse-n1 stands for Cortex-A76, for which LLVM has none of its own.
MODELS = (
    ("raspberry-pi-5", "neoverse-n1"),
    ("graviton4+dotprod", "neoverse-v2"),
    ("graviton4", "neoverse-v2"),
)
CASES = {  # name: weight format, function, rows of weights' bytes that one product reads (4 bits: a half)
    "INT4 decode": (WeightFormat.int4(128), "gemv", 0.5),
    "INT8 decode": (WeightFormat.int8(128), "gemv", 1.0),
    "INT8 tile": (WeightFormat.int8(128), "gemm", 1.0),
}


@dataclass(frozen=True)
class Loop:
    """One inner loop: its instructions by kind, each per 128 bytes of weights, and its text."""

    dots: float
    unpack: float
    loads: float
    other: float
    stack: int
    products: int
    widest: int  # products of its widest dot instruction
    text: str


def inner_loop(target_name: str, case: str) -> Loop:
    """Compile a case for a target ("NAME" or "NAME+ISA"); return its inner loop with most dot products."""
    name, _, isa = target_name.partition("+")
    target = Target.parse(name).with_isa(isa) if isa else Target.parse(name)
    weight, function, bytes_a_product = CASES[case]
    spec = QuantMatmulSpec(1024, 1024, weight)
    configuration = TVM_CPU.space(spec, target)[0]
    assert TVM_CPU.lower is not None
    chosen = [f for f in TVM_CPU.lower(spec, configuration, target) if f.attrs["global_symbol"] == function]
    names = _DOTS[target.isa]
    loops = _loops(tvm_llvm.inspect(chosen, target).assembly)
    hot = max(loops, key=lambda lines: sum(_mnemonic(line) in names for line in lines))
    kinds = [_mnemonic(line) for line in hot]
    products = sum(_PRODUCTS.get(kind, 0) for kind in kinds)
    widest = max(_PRODUCTS.get(kind, 0) for kind in kinds)
    rows = 1 if function == "gemv" else int(configuration["large_rows"])
    scale = 128 / (products / rows * bytes_a_product)

    def of(names: tuple[str, ...], vector: bool | None = None) -> float:
        return scale * sum(
            kind in names and vector in (None, bool(re.search(r"\bv\d+\.", line)))
            for kind, line in zip(kinds, hot)
        )

    dots, unpack, loads = of(names), of(_UNPACK, vector=True), of(_LOADS)
    other = scale * len(hot) - dots - unpack - loads
    return Loop(
        dots, unpack, loads, other, sum("[sp" in line for line in hot), products, widest, "\n".join(hot)
    )


def cycles(loop: Loop, cpu: str) -> float:
    """Return llvm-mca's cycles of one turn of a loop on `cpu`. Raises UnsupportedError without llvm-mca."""
    tool = next((t for t in MCA if shutil.which(t)), None)
    if tool is None:
        raise UnsupportedError("llvm-mca is missing: apt-get install llvm-19")
    command = [tool, "-mtriple=aarch64-linux-gnu", f"-mcpu={cpu}", "-mattr=+dotprod,+i8mm", "-iterations=200"]
    result = subprocess.run(command, input=loop.text, capture_output=True, text=True, check=False)
    found = re.search(r"Total Cycles:\s+(\d+)", result.stdout)
    if found is None:
        raise UnsupportedError(f"{tool} does not take the loop: {result.stderr.strip()[:300]}")
    return int(found.group(1)) / 200


def share_of_peak(loop: Loop, cpu: str) -> float:
    """Return which share of `cpu`'s dot pipes a loop fills, by llvm-mca."""
    return loop.products / cycles(loop, cpu) / (_PIPES[cpu] * loop.widest)


def _loops(assembly: str) -> list[list[str]]:
    """Return the instructions of those blocks that jump to their own label."""
    found, label, block = [], "", []
    for line in assembly.splitlines():
        if start := re.match(r"(\.L\w+):", line):
            label, block = start.group(1), []
        elif line.startswith("\t") and not line.startswith("\t."):
            line = line.split("//")[0].rstrip()
            if not line.strip():
                continue
            block.append(line)
            if re.match(r"\t(b\.|cbn?z|tbn?z|b\t)", line):
                if re.search(rf"{re.escape(label)}$", block[-1]) and label:
                    found.append(block)
                label, block = "", []
    return found


def _mnemonic(line: str) -> str:
    return line.split()[0]


def main() -> None:
    """Print the table."""
    print(
        "| kernel | compiled for | dot | unpack | loads | other | llvm-mca on | products a cycle | of peak |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for target_name, cpu in MODELS:
        for case in CASES:
            loop = inner_loop(target_name, case)
            rate = loop.products / cycles(loop, cpu)
            counts = " | ".join(f"{n:.1f}" for n in (loop.dots, loop.unpack, loop.loads, loop.other))
            share = share_of_peak(loop, cpu)
            print(f"| {case} | {target_name} | {counts} | {cpu} | {rate:.1f} | {share:.2f} |", flush=True)


if __name__ == "__main__":
    main()
