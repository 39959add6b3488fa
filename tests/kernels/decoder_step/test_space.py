"""The step's tuning space: weights of 8 bits among others have a prefetch of their own."""

from __future__ import annotations

import pytest

from edgeformer.compiler.space import Space
from edgeformer.compiler.target import Target
from edgeformer.kernels.decoder_step import TVM_CPU, DecoderStepSpec, LayerFormats
from edgeformer.kernels.quant_matmul import WeightFormat
from edgeformer.kernels.quant_matmul.tvm_cpu_stream import Prefetch

INT4, INT8 = WeightFormat.int4(), WeightFormat.int8()


def step(layer: WeightFormat, head: WeightFormat) -> DecoderStepSpec:
    layers = (LayerFormats(layer, layer, layer, layer),)
    return DecoderStepSpec(128, 160, 320, 2, 1, 64, 1e-5, layers, head, head, "packed", 64)


@pytest.mark.parametrize(
    ("name", "few_bits", "int8"),
    [("znver3", 1024, 0), ("znver5", 4096, 4096), ("sapphirerapids", 16384, 16384)],
)
def test_weights_of_8_bits_are_asked_for_by_themselves(name: str, few_bits: int, int8: int) -> None:
    space = TVM_CPU.space(step(INT4, INT8), Target.parse(name))
    assert isinstance(space, Space)
    assert {axis.name for axis in space.axes} >= {"prefetch", "prefetch_int8"}
    assert Prefetch.of(space.default, 4).distance == few_bits
    assert Prefetch.of(space.default, 8).distance == int8
    assert {Prefetch.of(member, 8).distance > 0 for member in space} == {True, False}


@pytest.mark.parametrize(("weight", "distance"), [(INT4, 1024), (INT8, 0)])
def test_one_format_needs_one_axis(weight: WeightFormat, distance: int) -> None:
    space = TVM_CPU.space(step(weight, weight), Target.parse("znver3"))
    assert isinstance(space, Space)
    assert "prefetch_int8" not in space.default
    assert Prefetch.of(space.default, weight.bits).distance == distance
