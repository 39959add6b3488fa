"""Every instruction set x weight format x skeleton x epilogue compiles, to instructions that the CPU has.

What this host can run is compared with the reference (test_quant_matmul.py) or, for Arm, under qemu
(test_emulated.py); here are the others, and the whole product among the slow tests.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest

from edgeformer.compiler.backends import tvm_llvm
from edgeformer.compiler.operator import Declined
from edgeformer.compiler.target import ISA_FEATURES, Target, known_targets
from edgeformer.kernels.quant_matmul import TVM_CPU, QuantMatmulSpec
from edgeformer.kernels.shared.isa.table import MATRIX, by_name

from .conftest import FORMATS, HERE, MORE_FORMATS
from .test_quant_matmul import DTYPES, EPILOGUES, make_spec

# The first target of each entry; the data that ships has one for all.
TARGETS = {isa: next(n for n in known_targets() if Target.parse(n).isa == isa) for isa, _ in ISA_FEATURES}
# Instructions of int8 products by entry, and those that its CPUs lack (AVX-512's registers: zmm).
PRODUCTS = {
    "amx": "vpdpbusd", "avx512_vnni": "vpdpbusd", "avx512": "vpmaddubsw|vpmaddwd", "avx_vnni": "vpdpbusd",
    "avx2": "vpmaddubsw|vpmaddwd", "i8mm": "us?mmla|u?sdot", "dotprod": "sdot", "neon": "smlal|smull",
    "portable": "pmaddwd|pmul|imul",
}  # fmt: skip
LACKING = {
    "avx512_vnni": "tdp", "avx512": "vpdpbusd|tdp", "avx_vnni": "zmm|tdp", "avx2": "vpdpbusd|zmm|tdp",
    "portable": r"[yz]mm|v(?:mov|p|add|mul|cvt|fmadd)\w*", "dotprod": "usdot|smmla|usmmla|ptrue",
    "neon": "sdot|usdot|smmla|usmmla|ptrue",
}  # fmt: skip


def activations(isa: str, fmt: str) -> list[str]:
    found = ["float"] if FORMATS[fmt][0].is_float else ["int8", "float"]
    return [*found, "bfloat16"] if isa in MATRIX else found


def whole() -> Iterator[Any]:
    for isa, fmt, dtype, epilogue in itertools.product(TARGETS, FORMATS, DTYPES, EPILOGUES):
        for act in activations(isa, fmt):
            yield pytest.param(
                isa, make_spec(fmt, act, dtype, epilogue), id=f"{isa}-{fmt}-{act}-{dtype}-{epilogue}"
            )


def covering() -> Iterator[Any]:
    """Entries that this host cannot run, with every format; epilogues and types turn."""
    elsewhere = [isa for isa in TARGETS if isa not in HERE]
    for (a, isa), (b, fmt) in itertools.product(enumerate(elsewhere), enumerate(FORMATS)):
        acts = activations(isa, fmt)
        act = acts[0] if (a + b) % 4 else acts[-1]
        spec = make_spec(fmt, act, DTYPES[(b // 2 + a) % 3], EPILOGUES[(b + 2 * a) % len(EPILOGUES)])
        slow = [pytest.mark.slow] if fmt in MORE_FORMATS else []
        yield pytest.param(isa, spec, marks=slow, id=f"{isa}-{fmt}")


def compiles(isa: str, spec: QuantMatmulSpec) -> None:
    target = Target.parse(TARGETS[isa])
    assert target.isa == isa and TVM_CPU.lower is not None
    answer = TVM_CPU.decide(spec, target)
    assert not isinstance(answer, Declined), answer
    functions = TVM_CPU.lower(spec, TVM_CPU.space(spec, target)[0], target)
    names = {str(f.attrs["global_symbol"]) for f in functions}
    assert names == ({"gemm"} if spec.activation == "bfloat16" else {"gemv", "rows", "gemm"})
    text = tvm_llvm.inspect(functions, target).assembly
    body = "\n".join(
        line for line in text.splitlines() if line.startswith("\t") and not line.startswith("\t.")
    )
    if spec.activation == "int8" and not spec.weight.is_float:
        assert re.search(rf"^\t(?:\{{\w+\}} )?(?:{PRODUCTS[isa]})", body, re.MULTILINE), f"no {PRODUCTS[isa]}"
    if isa in LACKING:
        foreign = re.search(rf"^.*\b(?:{LACKING[isa]}).*$", body, re.MULTILINE)
        assert foreign is None, f"{isa} has no {foreign and foreign.group().strip()}"


@pytest.mark.parametrize(("isa", "spec"), list(covering()))
def test_compiles(isa: str, spec: QuantMatmulSpec) -> None:
    compiles(isa, spec)


@pytest.mark.slow
@pytest.mark.parametrize(("isa", "spec"), list(whole()))
def test_the_whole_product_compiles(isa: str, spec: QuantMatmulSpec) -> None:
    compiles(isa, spec)


@pytest.mark.parametrize("fmt", ["int4", "int8", "int6-blocked", "bfloat16"])
def test_a_cpu_without_avx2_runs_the_portable_entry(fmt: str) -> None:
    """Its code has no instruction of AVX."""
    assert Target.parse("x86-64-v2").isa == "portable"
    compiles("portable", make_spec(fmt, activations("portable", fmt)[0], "float32", EPILOGUES[4]))


def test_every_entry_has_a_target() -> None:
    assert set(TARGETS) == set(PRODUCTS)
    for isa, name in TARGETS.items():
        assert by_name(isa).name == Target.parse(name).isa
