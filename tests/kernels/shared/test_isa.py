"""Instruction-set entries: dot products against numpy, at the extremes of every type."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from edgeformer.compiler.backends import tvm_llvm
from edgeformer.compiler.target import ISA_FEATURES, detect
from edgeformer.kernels.shared.isa.table import TABLE, Isa, by_name, for_target

HERE = [*(name for name, needed in ISA_FEATURES if needed <= detect().features), "portable16"]
ROUNDS = 64
GENERATOR = np.random.default_rng(3)


@functools.cache
def kernel(isa_name: str, op: str, left: str, right: str, steps: int) -> Any:
    """f(a, b, out): for each round, `steps` operations from zero, widened to int32 [ROUNDS, lanes]."""
    from edgeformer.kernels.shared import tir
    from edgeformer.kernels.shared.tir import T

    isa = by_name(isa_name)
    per_lane = 2 if op == "dot2" else 4
    n = per_lane * isa.lanes
    narrow = op == "dot4" and isa.accumulator == "int16"
    k = tir.Kernel("f", [("a", "*" + left), ("b", "*" + right), ("out", "*int32")])
    with tir.loop(ROUNDS) as i:
        acc = tir.Register("int16", isa.accumulator_lanes) if narrow else tir.Register("int32", isa.lanes)
        acc.set(tir.splat(T.int16(0), isa.accumulator_lanes) if narrow else tir.i32(0, isa.lanes))
        for step in range(steps):
            at = tir.let(i * (steps * n) + step * n)
            acc.set(getattr(isa, op)(acc.get(), tir.load(k["a"], at, n), tir.load(k["b"], at, n)))
        tir.store(k["out"], i * isa.lanes, isa.widen(acc.get()) if narrow else acc.get())
    target = detect().with_isa(isa_name)
    return tvm_llvm.JitLibrary(tvm_llvm.compile_module([k.finish()], target)).function("f")


def check(isa_name: str, op: str, a: np.ndarray, b: np.ndarray, steps: int) -> None:
    isa, per_lane = by_name(isa_name), 2 if op == "dot2" else 4
    shape = (ROUNDS, steps, isa.lanes, per_lane)
    a, b = np.ascontiguousarray(a.reshape(shape)), np.ascontiguousarray(b.reshape(shape))
    out = np.full((ROUNDS, isa.lanes), -7, dtype=np.int32)
    kernel(isa_name, op, str(a.dtype), str(b.dtype), steps)(a.ctypes.data, b.ctypes.data, out.ctypes.data)
    np.testing.assert_array_equal(out, (a.astype(np.int64) * b.astype(np.int64)).sum((1, 3)))


def drawn(isa: Isa, steps: int, per_lane: int, low: int, high: int, dtype: str, extremes: bool) -> np.ndarray:
    size = ROUNDS * steps * isa.lanes * per_lane
    if extremes:
        return GENERATOR.choice(np.array([low, high, 0], dtype=dtype), size, p=[0.45, 0.45, 0.1])
    return GENERATOR.integers(low, high + 1, size).astype(dtype)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("umax", [3, 15, 255])
def test_dot4(name: str, umax: int) -> None:
    isa = by_name(name)
    if isa.int8_codes == "signed" and umax == 255:
        pytest.skip(
            "255 * 127 * 2 does not fit int16: such codes are stored signed and go through dot4_signed"
        )
    steps = min(isa.dot4_steps(umax), 43)
    for extremes in (False, True):
        u = drawn(isa, steps, 4, 0, umax, "uint8", extremes)
        check(name, "dot4", u, drawn(isa, steps, 4, -127, 127, "int8", extremes), steps)
    for sign in (-127, 127):  # every product at its largest, all of one sign
        check(name, "dot4", np.full_like(u, umax), np.full(u.shape, sign, "int8"), steps)


@pytest.mark.parametrize("name", HERE)
def test_dot4_signed(name: str) -> None:
    isa, steps = by_name(name), 16
    for extremes in (False, True):
        w = drawn(isa, steps, 4, -128, 127, "int8", extremes)
        check(name, "dot4_signed", w, drawn(isa, steps, 4, -127, 127, "int8", extremes), steps)
    for weight in (-128, 127):
        for a in (-127, 127, 0):
            check(name, "dot4_signed", np.full(w.shape, weight, "int8"), np.full(w.shape, a, "int8"), steps)


@pytest.mark.parametrize("name", HERE)
def test_dot4_signed_on_all_pairs(name: str) -> None:
    isa = by_name(name)
    w, a = np.meshgrid(np.arange(-128, 128), np.arange(-127, 128))
    size = ROUNDS * isa.lanes * 4
    for start in range(0, w.size, size):
        part = np.arange(start, start + size) % w.size
        check(name, "dot4_signed", w.ravel()[part].astype("int8"), a.ravel()[part].astype("int8"), 1)


@pytest.mark.parametrize("name", HERE)
def test_dot2(name: str) -> None:
    isa, steps = by_name(name), 8
    for extremes in (False, True):
        a = drawn(isa, steps, 2, -255, 255, "int16", extremes)
        check(name, "dot2", a, drawn(isa, steps, 2, -127, 127, "int16", extremes), steps)
    a = drawn(isa, 1, 2, -32767, 32767, "int16", False)
    check(name, "dot2", a, drawn(isa, 1, 2, -32767, 32767, "int16", True), 1)


@pytest.mark.parametrize("name", sorted(TABLE))
def test_the_table_agrees_with_itself(name: str) -> None:
    isa = by_name(name)
    assert isa.name == name and isa.lanes in (4, 8, 16)
    assert 32 % isa.lanes == 0 and for_target(detect().with_isa(name)) == isa
    assert isa.dot4_steps(15) >= 2, "int4 needs two dots a step"


def test_vnni_uses_one_instruction() -> None:
    from edgeformer.compiler.target import Target
    from edgeformer.kernels.shared import tir

    isa = by_name("avx512_vnni")
    k = tir.Kernel("f", [("u", "*uint8"), ("s", "*int8"), ("out", "*int32")])
    acc = tir.load(k["out"], 0, 16)
    tir.store(k["out"], 0, isa.dot4(acc, tir.load(k["u"], 0, 64), tir.load(k["s"], 0, 64)))
    inspection = tvm_llvm.inspect([k.finish()], Target.parse("icelake-server"))
    assert inspection.count("vpdpbusd") == 1 and inspection.spills == 0
