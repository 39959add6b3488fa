"""The step's tuning space: weights of 8 bits among others, and several rows, have a prefetch of their own."""

from __future__ import annotations

import pytest

from edgeformer.compiler.space import Space
from edgeformer.compiler.target import Target
from edgeformer.kernels.decoder_step import TVM_CPU, DecoderStepSpec, LayerFormats
from edgeformer.kernels.quant_matmul import QuantMatmulSpec, WeightFormat
from edgeformer.kernels.quant_matmul.space import L1, L2, PAST, space
from edgeformer.kernels.quant_matmul.tvm_cpu_stream import Prefetch

INT4, INT8 = WeightFormat.int4(), WeightFormat.int8()


def step(layer: WeightFormat, head: WeightFormat) -> DecoderStepSpec:
    layers = (LayerFormats(layer, layer, layer, layer),)
    return DecoderStepSpec(128, 160, 320, 2, 1, 64, 1e-5, layers, head, head, "packed", 64)


@pytest.mark.parametrize(
    ("name", "few_bits", "int8"),
    [("znver3", 1024, 0), ("znver4", 1024, 1024), ("znver5", 4096, 4096), ("sapphirerapids", 16384, 16384)],
)
def test_weights_of_8_bits_are_asked_for_by_themselves(name: str, few_bits: int, int8: int) -> None:
    found = TVM_CPU.space(step(INT4, INT8), Target.parse(name))
    assert isinstance(found, Space)
    assert {axis.name for axis in found.axes} >= {"prefetch", "prefetch_int8"}
    assert Prefetch.of(found.default, 1, 4).distance == few_bits
    assert Prefetch.of(found.default, 1, 8).distance == int8
    assert {Prefetch.of(member, 1, 8).distance > 0 for member in found} == {True, False}


@pytest.mark.parametrize(("weight", "distance"), [(INT4, 1024), (INT8, 0)])
def test_one_format_needs_one_axis(weight: WeightFormat, distance: int) -> None:
    found = TVM_CPU.space(step(weight, weight), Target.parse("znver3"))
    assert isinstance(found, Space)
    assert "prefetch_int8" not in found.default
    assert Prefetch.of(found.default, 1, weight.bits).distance == distance


@pytest.mark.parametrize(
    ("name", "one", "few"),
    [
        ("znver3", Prefetch(1024, PAST), Prefetch(1024, L2)),
        ("znver4", Prefetch(1024, L2), Prefetch(8192, L2)),
        ("znver5", Prefetch(4096, L1), Prefetch(4096, L1)),
    ],
)
def test_several_rows_ask_as_a_product_of_several_rows_does(name: str, one: Prefetch, few: Prefetch) -> None:
    """No axis of the step's search, which times one row."""
    target = Target.parse(name)
    step_space = TVM_CPU.space(step(INT4, INT4), target)
    product = space(QuantMatmulSpec(64, 64, INT4, "int8"), target)
    for default in (step_space[0], product.default):
        assert (Prefetch.of(default, 1), Prefetch.of(default, 4)) == (one, few)
    assert {Prefetch.of(member, 4) for member in step_space} == {few}
    assert all(Prefetch.of(member, 4).locality != PAST for member in product)
