"""quant_matmul: every composition against the reference, at odd sizes, on NaN-filled outputs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from edgeformer.compiler.operator import Declined
from edgeformer.compiler.space import Space
from edgeformer.compiler.target import Target, detect, known_targets
from edgeformer.kernels.quant_matmul import (
    OPERATOR,
    TVM_CPU,
    CanonicalWeight,
    QuantMatmulSpec,
    WeightFormat,
    pack,
)
from edgeformer.kernels.quant_matmul.reference import quant_matmul as reference
from edgeformer.kernels.quant_matmul.reference import quantize_activations
from edgeformer.kernels.quant_matmul.space import fastest_activation
from edgeformer.runtime import launch

from .conftest import (
    FORMATS,
    HERE,
    MORE_FORMATS,
    UNITS,
    Guarded,
    assert_rows_close,
    bound,
    compare,
    extreme_weight,
    inputs,
    random_weight,
)

EPILOGUES: list[tuple[Any, ...]] = [  # epilogue, bias, residual, softcap
    ("none", False, False),
    ("none", True, False),
    ("none", False, True),
    ("silu_pair", False, False),
    ("silu_pair", True, True),
    ("gelu_pair", True, False),
    ("none", True, True, 2.0),
]
DTYPES = ["float32", "bfloat16", "float16"]
ACTIVATIONS = ["int8", "int8", "float"]
ROWS = (1, 2, 3, 5, 17, 130)


def make_spec(fmt: str, activation: str, dtype: str, epilogue: tuple[Any, ...]) -> QuantMatmulSpec:
    weight, n, k = FORMATS[fmt]
    return QuantMatmulSpec(n, k, weight, activation, dtype, *epilogue)


def covering() -> Iterator[Any]:
    """Every format on every composition; the other options turn, so that all pairs of options occur."""
    compositions = [(isa, ACTIVATIONS) for isa in HERE] + [(isa, ["bfloat16"]) for isa in UNITS]
    for (a, (isa, acts)), (b, fmt) in itertools.product(enumerate(compositions), enumerate(FORMATS)):
        act = acts[(a + b) % len(acts)]
        spec = make_spec(fmt, act, DTYPES[(b // 2 + a) % 3], EPILOGUES[(b + 2 * a) % len(EPILOGUES)])
        again = act == "bfloat16" and isa != UNITS[0] and b % 2 == 0
        again |= isa in ("avx512", "avx_vnni") and (a + b) % 4 != 0  # between two that are tried whole
        again |= fmt in MORE_FORMATS and (a + b) % 2 == 1
        name = f"{isa}-{spec.key().replace(' ', '-')}"
        yield pytest.param(isa, spec, marks=[pytest.mark.slow] * again, id=name)


@pytest.mark.parametrize(("isa", "spec"), list(covering()))
def test_against_the_reference(isa: str, spec: QuantMatmulSpec, guarded: Guarded) -> None:
    compare(isa, spec, random_weight(spec), ROWS, guarded)
    if not spec.weight.is_float:
        compare(isa, spec, extreme_weight(spec), (1, 3, 18), guarded)
    x, bias, residual = inputs(spec, 0)
    packed = pack(random_weight(spec), detect().with_isa(isa), pair=spec.pair)
    assert bound(isa, spec)(x, packed, bias, residual).shape == (0, spec.n_out)


# The specs below are built once for each composition and shared by the tests.
PLAIN = {
    "int4": make_spec("int4", "int8", "float32", ("none", False, False)),
    "int8": make_spec("int8", "int8", "float32", ("none", False, False)),
    "bfloat16": make_spec("bfloat16", "float", "float32", ("none", False, False)),
    "int4-unit": make_spec("int4", "bfloat16", "float32", ("none", False, False)),
    "bfloat16-unit": make_spec("bfloat16", "bfloat16", "float32", ("none", False, False)),
}
everywhere = pytest.mark.parametrize(
    ("isa", "name"), [(i, n) for n in PLAIN for i in (UNITS if PLAIN[n].activation == "bfloat16" else HERE)]
)


@everywhere
def test_many_rows_and_both_sides_of_each_switch(isa: str, name: str, guarded: Guarded) -> None:
    compare(isa, PLAIN[name], random_weight(PLAIN[name]), (4, 15, 16, 513), guarded)


@everywhere
def test_integers_are_exact(isa: str, name: str) -> None:
    """Whole numbers come out without any error: the sums of a group never saturate."""
    spec = PLAIN[name]
    weight = random_weight(spec) if spec.weight.is_float else extreme_weight(spec)
    if weight.scale is not None:
        weight = dataclasses.replace(weight, scale=torch.ones_like(weight.scale))
    else:
        weight = dataclasses.replace(weight, codes=torch.randint(-8, 9, (spec.n, spec.k)).to(torch.bfloat16))
    x = torch.where(torch.rand(20, spec.k) < 0.5, -127.0, 127.0)
    x[0], x[1], x[2] = 127, -127, 0
    packed = pack(weight, detect().with_isa(isa))
    want = x.double() @ weight.dequantize().double().T
    for rows in (x, x[:3], x[:1]):
        assert torch.equal(
            bound(isa, spec)(rows.contiguous(), packed, None, None).double(), want[: len(rows)]
        )


@everywhere
@pytest.mark.parametrize("m", [1, 5, 20])
def test_nan_and_inf_stay_in_their_rows(isa: str, name: str, m: int) -> None:
    spec = PLAIN[name]
    weight = random_weight(spec)
    call, packed = bound(isa, spec), pack(weight, detect().with_isa(isa))
    x, _, _ = inputs(spec, m)
    clean = call(x, packed, None, None)
    for column in (0, 40, spec.k - 1):  # in a first, an inner and a short last group
        for value in (torch.nan, torch.inf, -torch.inf):
            bad = x.clone()
            bad[m // 2, column] = value
            got = call(bad, packed, None, None)
            others = torch.arange(m) != m // 2
            assert torch.equal(got[others], clean[others])
            assert not got[m // 2].isfinite().any() and (
                got[m // 2].isnan().all() or spec.activation != "int8"
            )
            assert torch.equal(got.isnan(), reference(spec, bad, weight).isnan())


@everywhere
def test_zero_and_tiny_rows(isa: str, name: str) -> None:
    spec = PLAIN[name]
    packed = pack(random_weight(spec), detect().with_isa(isa))
    x = torch.zeros(4, spec.k)
    x[1], x[2, 5], x[3] = 1e-39, 1e-45, 1e-30 * torch.randn(spec.k)
    for rows in (x, x.repeat(8, 1)):
        got = bound(isa, spec)(rows, packed, None, None)
        assert (got[0] == 0).all() and got.isfinite().all() and got.abs().max() < 1e-25


@everywhere
def test_misaligned_memory(isa: str, name: str) -> None:
    """Views that start anywhere: the kernels assume no more than an element's alignment."""
    spec = PLAIN[name]
    weight = random_weight(spec)
    packed = pack(weight, detect().with_isa(isa))
    room = torch.empty(packed.nbytes + 64, dtype=torch.uint8)
    for offset, m in ((1, 1), (3, 3), (5, 20)):
        memory = torch.randn(offset + m * spec.k)
        x = memory[offset:].view(m, spec.k)
        assert_rows_close(bound(isa, spec)(x, packed, None, None), reference(spec, x, weight))
        # The packed buffer itself is only as aligned as a scale.
        start = -room.data_ptr() % 64 + 4 * offset
        moved = type(packed)(room[start : start + packed.nbytes].copy_(packed.buffer), *tuple_of(packed))
        assert_rows_close(bound(isa, spec)(x, moved, None, None), reference(spec, x, weight))


def tuple_of(packed: Any) -> tuple[WeightFormat, int, int, str]:
    return packed.format, packed.n, packed.k, packed.layout


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize(("isa", "name"), [(HERE[0], "int4"), (UNITS[0], "int4-unit")])
def test_any_number_of_threads(isa: str, name: str, count: int) -> None:
    before = torch.get_num_threads()
    spec = PLAIN[name]
    weight = random_weight(spec)
    try:
        torch.set_num_threads(count)
        for m in (1, 5, 40):
            x, _, _ = inputs(spec, m)
            got = bound(isa, spec)(x, pack(weight, detect().with_isa(isa)), None, None)
            assert_rows_close(got, reference(spec, x, weight))
    finally:
        torch.set_num_threads(before)


def test_every_tile_of_the_space_is_right() -> None:
    """Register tiles and switches change the code; prefetch distances do not change what is computed."""
    spec, target = PLAIN["int4"], detect()
    weight = random_weight(spec)
    packed = pack(weight, target)
    space = TVM_CPU.space(spec, target)
    assert isinstance(space, Space)
    changing = ("small_rows", "large_rows", "gemv_vectors", "small_vectors", "tile_vectors")
    shapes = {axis.name: axis.values for axis in space.axes if axis.name in changing}
    for turn in range(max(map(len, shapes.values()))):  # every value of every axis once
        configuration = space[0] | {name: values[turn % len(values)] for name, values in shapes.items()}
        call = launch.bind(OPERATOR, TVM_CPU, spec, configuration | {"gemm_from": 8}, target)
        for m in (1, 5, 7, 8, 29):
            x, _, _ = inputs(spec, m)
            assert_rows_close(call(x, packed, None, None), reference(spec, x, weight))


@pytest.mark.parametrize("name", ["znver5", "znver3", "x86-64-v2", "raspberry-pi-5"])
def test_space_starts_with_a_member_that_names_every_axis(name: str) -> None:
    found = TVM_CPU.space(PLAIN["int4"], Target.parse(name))
    assert isinstance(found, Space)
    assert set(found[0]) == {axis.name for axis in found.axes} >= {"small_rows", "large_rows", "prefetch"}
    assert len({tuple(c.items()) for c in found}) == len(found)


def test_auto_is_bf16_for_many_rows_on_a_matrix_unit_and_no_less_exact_than_the_weight() -> None:
    """Weights of more significant bits than bf16 has keep float activations everywhere."""
    for target in [Target.parse(name) for name in known_targets()] + [detect().with_isa("portable16")]:
        for name, (fmt, _, _) in FORMATS.items():
            few = "float" if fmt.is_float else "int8"
            many = "bfloat16" if target.isa == "amx" and name not in ("float16", "float32") else few
            assert [fastest_activation(m, fmt, target) for m in (0, 1, 8, 9, 4096)] == [few] * 3 + [many] * 2


def test_the_form_declines_with_a_reason() -> None:
    stored = QuantMatmulSpec(8, 32, WeightFormat.int8(32, "minimum"))
    answer = TVM_CPU.decide(stored, detect())
    assert isinstance(answer, Declined) and "8-bit" in answer.reason
    elsewhere = dataclasses.replace(detect(), backends=("torch",), name="bare")
    answer = TVM_CPU.decide(PLAIN["int4"], elsewhere)
    assert isinstance(answer, Declined) and "bare" in answer.reason
    assert TVM_CPU.decide(PLAIN["int4"], detect()) is None
    for name in known_targets():
        target = Target.parse(name)
        answer = TVM_CPU.decide(PLAIN["int4-unit"], target)
        assert isinstance(answer, Declined) == (target.isa != "amx")
        assert answer is None or f"{target.isa} has no bf16 matrix unit" in answer.reason


def test_the_reference_is_the_dequantised_product() -> None:
    """With codes that the int8 quantiser reproduces exactly, both activations give x @ W.T."""
    for fmt, n, k in FORMATS.values():
        weight = CanonicalWeight.from_float(torch.randn(n, k), fmt)
        x = torch.randint(-127, 128, (3, k)).float()
        if not fmt.is_float:
            x[:, :: fmt.group_size] = 127
        want = x.double() @ weight.dequantize().double().T
        for activation in ("int8", "float"):
            spec = QuantMatmulSpec(n, k, fmt, activation)
            assert_rows_close(reference(spec, x, weight), want.float())
        rounded = x.double() @ weight.dequantize().bfloat16().double().T
        assert_rows_close(reference(QuantMatmulSpec(n, k, fmt, "bfloat16"), x, weight), rounded.float())


def test_the_quantiser_by_hand() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, 4.0], [0.0, 0.0, 0.0, 0.0, torch.inf]])
    codes, scales = quantize_activations(x, 4)
    assert codes[0, 0].tolist() == [127, 0, 2, -2] and codes[0, 1].tolist() == [127, 0, 0, 0]
    assert scales[0].tolist() == pytest.approx([1.0, 4 / 127])
    assert scales[1, 0] == 0 and scales[1, 1].isnan() and (codes[1] == 0).all()
