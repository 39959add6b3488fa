"""Every instruction set x weight format x skeleton x epilogue composes, in instructions that the CPU has.

What this host can run, and Arm where there is qemu, is compared with the reference: the TIR is the same as at
full optimisation, which the other tests compile. Here a share of the product runs; the whole of it is slow:
`pytest -m slow tests/kernels/quant_matmul/test_compositions.py`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeformer.compiler import emulator
from edgeformer.compiler.backends import tvm_llvm
from edgeformer.compiler.operator import Declined
from edgeformer.compiler.target import ISA_FEATURES, Target, detect, known_targets
from edgeformer.kernels.quant_matmul import TVM_CPU, QuantMatmulSpec
from edgeformer.kernels.shared.isa.table import MATRIX, by_name
from edgeformer.runtime import threads

from .conftest import FORMATS, HERE, MORE_FORMATS, Guarded, compare_call, random_weight
from .test_quant_matmul import DTYPES, EPILOGUES, make_spec

# The first target of each entry; the data that ships has one for all.
TARGETS = {isa: next(n for n in known_targets() if Target.parse(n).isa == isa) for isa, _ in ISA_FEATURES}
# Instructions of int8 products by entry, and those that its CPUs lack (AVX-512's registers: zmm).
PRODUCTS = {
    "amx": "vpdpbusd", "avx512_vnni": "vpdpbusd", "avx512": "vpmaddubsw|vpmaddwd", "avx_vnni": "vpdpbusd",
    "avx2": "vpmaddubsw|vpmaddwd", "i8mm": "us?mmla|u?sdot", "dotprod": "sdot", "neon": "smlal|smull",
    "portable": "pmaddwd|pmul|imul",
}  # fmt: skip
UNFUSED = {"neon": "s?mul"}  # without optimisation LLVM widens, then multiplies
LACKING = {
    "avx512_vnni": "tdp", "avx512": "vpdpbusd|tdp", "avx_vnni": "zmm|tdp", "avx2": "vpdpbusd|zmm|tdp",
    "portable": r"[yz]mm|v(?:mov|p|add|mul|cvt|fmadd)\w*", "dotprod": "usdot|smmla|usmmla|ptrue",
    "neon": "sdot|usdot|smmla|usmmla|ptrue",
}  # fmt: skip

# What the assembler has to be told so that it takes every instruction that LLVM writes.
ASSEMBLER = {"aarch64": ("-march=armv9-a+i8mm+bf16+fp16",)}


def activations(isa: str, fmt: str) -> list[str]:
    found = ["float"] if FORMATS[fmt][0].is_float else ["int8", "float"]
    return [*found, "bfloat16"] if isa in MATRIX else found


def specs(isa: str, fmt: str, act: str) -> list[QuantMatmulSpec]:
    """One spec an epilogue. The types of x turn: every one meets every format, entry and epilogue."""
    turn = list(TARGETS).index(isa) + list(FORMATS).index(fmt)
    return [make_spec(fmt, act, DTYPES[(turn + e) % 3], epilogue) for e, epilogue in enumerate(EPILOGUES)]


def traits(isa: str, fmt: str, act: str) -> tuple[Any, ...]:
    """What tells the functions of two entries apart: the products by int8, and how 8-bit codes are stored."""
    entry, bits = by_name(isa), FORMATS[fmt][0].bits
    shape = Target.parse(TARGETS[isa]).arch, entry.lanes, entry.tiles
    codes = entry.int8_codes if bits == 8 and not FORMATS[fmt][0].is_float else ""
    return (*shape, act, codes, entry.module if act == "int8" else "")


def whole() -> Iterator[Any]:
    """Entries whose functions are the same are one case: the first of them runs, if any of them can."""
    for fmt in FORMATS:
        alike: dict[tuple[Any, ...], list[str]] = {}
        for isa in sorted(TARGETS, key=lambda isa: isa not in HERE):
            for act in activations(isa, fmt):
                alike.setdefault(traits(isa, fmt, act), []).append(isa)
        for key, entries in alike.items():
            yield pytest.param(entries, fmt, key[3], id=f"{'+'.join(entries)}-{fmt}-{key[3]}")


def covering() -> Iterator[Any]:
    """Entries that this host cannot run, with every format; epilogues and types turn."""
    elsewhere = [isa for isa in TARGETS if isa not in HERE]
    for (a, isa), (b, fmt) in itertools.product(enumerate(elsewhere), enumerate(FORMATS)):
        acts = activations(isa, fmt)
        act = acts[0] if (a + b) % 4 else acts[-1]
        spec = make_spec(fmt, act, DTYPES[(b // 2 + a) % 3], EPILOGUES[(b + 2 * a) % len(EPILOGUES)])
        slow = [pytest.mark.slow] if fmt in MORE_FORMATS else []
        yield pytest.param(isa, spec, marks=slow, id=f"{isa}-{fmt}")


def lower(isa: str, spec: QuantMatmulSpec, like: str = "") -> list[Any]:
    """Lower for an entry, in its default configuration or in that of another."""
    target = Target.parse(TARGETS[isa])
    assert target.isa == isa and TVM_CPU.lower is not None
    answer = TVM_CPU.decide(spec, target)
    assert not isinstance(answer, Declined), answer
    configuration = TVM_CPU.space(spec, Target.parse(TARGETS[like or isa]))[0]
    functions = TVM_CPU.lower(spec, configuration, target)
    names = {str(f.attrs["global_symbol"]) for f in functions}
    direct = {"gemv", "rows", *(["wide"] if configuration["wide_rows"] else [])}
    assert names == {"gemm"} | (set() if spec.activation == "bfloat16" else direct)
    return functions


def has_its_instructions(isa: str, spec: QuantMatmulSpec, assembly: str, functions: int, level: int) -> None:
    expected = UNFUSED.get(isa, PRODUCTS[isa]) if level == 0 else PRODUCTS[isa]
    body = "\n".join(
        line for line in assembly.splitlines() if line.startswith("\t") and not line.startswith("\t.")
    )
    if spec.activation == "int8" and not spec.weight.is_float:
        products = re.findall(rf"^\t(?:\{{\w+\}}\s+)?(?:{expected})", body, re.MULTILINE)
        assert len(products) >= functions, f"{len(products)} of {expected} in {functions} functions"
    if isa in LACKING:
        foreign = re.search(rf"^.*\b(?:{LACKING[isa]}).*$", body, re.MULTILINE)
        assert foreign is None, f"{isa} has no {foreign and foreign.group().strip()}"


def compiles(isa: str, spec: QuantMatmulSpec) -> None:
    functions = lower(isa, spec)
    assembly = tvm_llvm.inspect(functions, Target.parse(TARGETS[isa])).assembly
    has_its_instructions(isa, spec, assembly, len(functions), level=3)


class Renamed:
    """Of a library of several specs the functions of one."""

    def __init__(self, library: Any, number: int) -> None:
        self._library, self._number = library, number

    def function(self, name: str) -> Any:
        return self._library.function(f"{name}_{self._number}")


def load(isa: str, assembly: str, folder: Path) -> Any | None:
    """Link and load the assembly; None where nothing here runs it."""
    target = Target.parse(TARGETS[isa])
    foreign, linker = target.arch != detect().arch, tvm_llvm.linker(target)
    if (emulator.missing(target.arch) if foreign else isa not in HERE) or linker is None:
        return None
    source, library = folder / "kernels.s", folder / "kernels.so"
    # Without the lines for debuggers: assemblers before DWARF 5 do not know them.
    source.write_text(re.sub(r"^\t\.(?:file|loc)\t.*\n", "", assembly, flags=re.MULTILINE))
    options = [*ASSEMBLER.get(target.arch, ()), "-shared", "-o", str(library)]
    tvm_llvm.run_tool([*linker, *options, str(source), "-lm"])
    if foreign:
        return emulator.EmulatedLibrary(library, emulator.cpu_for(target), threads=2)
    loaded = tvm_llvm.load(library)
    threads.attach(loaded)
    return loaded


def compose(
    isa: str, wanted: list[QuantMatmulSpec], lowered: list[Any], folder: Path, guarded: Guarded
) -> None:
    """Compile specs as one module, without LLVM's optimisations, and run them where that is possible."""
    target = Target.parse(TARGETS[isa])
    functions = [
        function.with_attr("global_symbol", f"{function.attrs['global_symbol']}_{number}")
        for number, group in enumerate(lowered)
        for function in group
    ]
    assembly = tvm_llvm.inspect_executable(tvm_llvm.compile_module(functions, target, level=0)).assembly
    has_its_instructions(isa, wanted[0], assembly, len(functions), level=0)
    library = load(isa, assembly, folder)
    assert library is not None or isa not in HERE
    for number, spec in enumerate(wanted if library else ()):
        call = TVM_CPU.bind(spec, TVM_CPU.space(spec, target)[0], target, Renamed(library, number))
        rows = (1, 3, 35) if spec.activation == "bfloat16" else (1, 3, 7, 18)
        compare_call(call, target, spec, random_weight(spec), rows, guarded)


@pytest.mark.parametrize(("isa", "spec"), list(covering()))
def test_a_share_of_the_product(isa: str, spec: QuantMatmulSpec, tmp_path: Path, guarded: Guarded) -> None:
    compose(isa, [spec], [lower(isa, spec)], tmp_path, guarded)


@pytest.mark.slow
@pytest.mark.parametrize(("entries", "fmt", "act"), list(whole()))
def test_the_whole_product(entries: list[str], fmt: str, act: str, tmp_path: Path, guarded: Guarded) -> None:
    """A module has every skeleton with every epilogue; of entries that are alike one is compiled."""
    import tvm_ffi

    isa, *others = entries
    wanted = specs(isa, fmt, act)
    lowered = [lower(isa, spec) for spec in wanted]
    for other, (spec, functions) in itertools.product(others, zip(wanted, lowered)):
        pairs = zip(functions, lower(other, spec, isa), strict=True)
        assert all(tvm_ffi.structural_equal(*pair) for pair in pairs), f"{other} is not {isa}"
    compose(isa, wanted, lowered, tmp_path, guarded)


@pytest.mark.parametrize("fmt", ["int4", "int8"])
def test_neon_multiplies_and_widens_in_one_instruction(fmt: str) -> None:
    compiles("neon", make_spec(fmt, "int8", "float32", EPILOGUES[0]))


@pytest.mark.parametrize("fmt", ["int4", "int8", "int6-blocked", "bfloat16"])
def test_a_cpu_without_avx2_runs_the_portable_entry(fmt: str) -> None:
    """Its code has no instruction of AVX."""
    assert Target.parse("x86-64-v2").isa == "portable"
    compiles("portable", make_spec(fmt, activations("portable", fmt)[0], "float32", EPILOGUES[4]))


def test_every_entry_has_a_target() -> None:
    assert set(TARGETS) == set(PRODUCTS)
    for isa, name in TARGETS.items():
        assert by_name(isa).name == Target.parse(name).isa
