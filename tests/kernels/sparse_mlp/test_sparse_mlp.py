"""The sparse MLP against the reference: thresholds, given blocks, odd sizes, on NaN-filled outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from edgeformer.compiler.errors import UnsupportedError
from edgeformer.compiler.operator import Declined
from edgeformer.compiler.target import detect
from edgeformer.kernels.quant_matmul import CanonicalWeight, WeightFormat, pack
from edgeformer.kernels.quant_matmul import QuantMatmulSpec as Dense
from edgeformer.kernels.quant_matmul.reference import quant_matmul as dense_reference
from edgeformer.kernels.shared import scratch
from edgeformer.kernels.sparse_mlp import OPERATOR, TVM_CPU, SparseMlpSpec
from edgeformer.kernels.sparse_mlp.reference import active, gates
from edgeformer.kernels.sparse_mlp.reference import sparse_mlp as reference
from edgeformer.runtime import launch, ops

INT4, INT4_128 = WeightFormat.int4(), WeightFormat.int4(128)
SPECS = [
    SparseMlpSpec(100, 192, INT4, INT4),
    SparseMlpSpec(257, 256, INT4_128, INT4_128, "relu", x_dtype="bfloat16"),
    SparseMlpSpec(66, 192, WeightFormat.int8(), WeightFormat.int4(64, "minimum"), "gelu_tanh"),
    SparseMlpSpec(96, 128, INT4, WeightFormat.int8(), select="indices", x_dtype="float16"),
    SparseMlpSpec(130, 192, WeightFormat.int4(64, "integer"), INT4, select="indices", arithmetic="float"),
    SparseMlpSpec(64, 256, INT4, INT4_128, arithmetic="float"),
]
ROWS = (1, 2, 5, 9)


def bound(spec: SparseMlpSpec, isa: str = "", **changes: Any) -> Callable[..., torch.Tensor]:
    target = detect().with_isa(isa) if isa else detect()
    return launch.bind(OPERATOR, TVM_CPU, spec, {**TVM_CPU.space(spec, target)[0], **changes}, target)


def weights(spec: SparseMlpSpec) -> tuple[CanonicalWeight, CanonicalWeight]:
    """Random weights; the neurons of some blocks have small gates, so that a threshold separates them."""
    torch.manual_seed(spec.neurons + spec.hidden)
    both = torch.randn(2 * spec.neurons, spec.hidden) / spec.hidden**0.5
    both[: spec.neurons].view(spec.blocks, -1)[1::3] *= 0.05
    down = torch.randn(spec.hidden, spec.neurons) / spec.neurons**0.5
    return CanonicalWeight.from_float(both, spec.gate_up), CanonicalWeight.from_float(down, spec.down)


def threshold_for(spec: SparseMlpSpec, x: torch.Tensor, gate_up: CanonicalWeight, share: float) -> float:
    """A threshold in a gap between the blocks' largest gates: rounding cannot move a block over it."""
    largest = gates(spec, x, gate_up).abs().view(-1, spec.block).amax(1).sort().values
    cuts = (largest[1:] / largest[:-1].clamp_min(1e-12)) > 1.001
    wanted = round(share * (len(largest) - 1))
    places = cuts.nonzero().flatten()
    place = int(places[(places - wanted).abs().argmin()])
    return float((largest[place] + largest[place + 1]) / 2)


def compare(spec: SparseMlpSpec, call: Callable[..., torch.Tensor], isa: str = "", rows: Any = ROWS) -> None:
    gate_up, down = weights(spec)
    target = detect().with_isa(isa) if isa else detect()
    packed = pack(gate_up, target, pair=True), pack(down, target)
    for m in rows:
        x = torch.randn(m, spec.hidden).to(getattr(torch, spec.x_dtype))
        choices: list[dict[str, Any]]
        if spec.select == "indices":
            some = torch.arange(0, spec.blocks, 2)
            choices = [{"indices": i} for i in (some, some[:0], torch.arange(spec.blocks))]
        else:
            cut = threshold_for(spec, x, gate_up, 0.5)
            # Where all blocks fired, the next row of one takes gates and ups in one pass.
            choices = [{"threshold": t} for t in (cut, 0.0, cut, 1e9, 0.0, 0.0, 1e9)]
        for options in choices:
            out = torch.full((m, spec.hidden), torch.nan, dtype=x.dtype)
            held = scratch.local.buffer
            if held is not None:
                held.fill_(255)
            got = call(x, *packed, out=out, **options).double()
            want = reference(spec, x.float(), gate_up, down, **options).double()
            error = (got - want).norm(dim=1) / want.norm(dim=1).clamp_min(1e-30)
            assert (error <= spec.tolerance).all(), f"M={m} {options}: {error.max():.2e}"


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.key())
def test_equals_the_reference(spec: SparseMlpSpec) -> None:
    compare(spec, bound(spec))


@pytest.mark.parametrize("isa", ["portable", "portable16", "avx2"])
def test_other_instruction_sets(isa: str) -> None:
    if isa == "avx2" and "avx2" not in detect().features:
        pytest.skip("this host has no AVX2")
    compare(SPECS[0], bound(SPECS[0], isa), isa, rows=(1, 5))


def test_every_fallback_gives_the_same() -> None:
    for dense_from in (1, 50, 100):
        compare(SPECS[0], bound(SPECS[0], dense_from=dense_from, prefetch=0), rows=(1, 5))


def test_the_reference_is_the_dense_mlp_with_a_mask() -> None:
    spec = dataclasses.replace(SPECS[0], arithmetic="float")
    gate_up, down = weights(spec)
    x = torch.randn(3, spec.hidden)
    both = x.double() @ gate_up.dequantize().double().T
    gate, up = both.chunk(2, 1)
    h = gate * torch.sigmoid(gate) * up
    dense = (h @ down.dequantize().double().T).float()
    assert torch.allclose(reference(spec, x, gate_up, down, threshold=0.0), dense, atol=1e-5)
    cut = threshold_for(spec, x, gate_up, 0.5)
    seen = active(spec, x, gate_up, threshold=cut)
    assert 0 < seen.sum() < seen.numel()
    masked = h * seen.repeat_interleave(spec.block, 1)
    sparse = reference(spec, x, gate_up, down, threshold=cut)
    assert torch.allclose(sparse, (masked @ down.dequantize().double().T).float(), atol=1e-5)


def test_a_zero_threshold_is_the_dense_product() -> None:
    spec = SPECS[0]
    gate_up, down = weights(spec)
    x = torch.randn(1, spec.hidden)
    got = ops.sparse_mlp(x, pack(gate_up, pair=True), pack(down), threshold=0.0)
    pair, last = spec.products()
    h = dense_reference(Dense(pair.n, pair.k, pair.weight, epilogue="silu_pair"), x, gate_up)
    want = dense_reference(last, h, down)
    assert (got - want).norm() / want.norm() < 1e-5


def test_the_op() -> None:
    spec = SPECS[0]
    gate_up, down = weights(spec)
    packed = pack(gate_up, pair=True), pack(down)
    x = torch.randn(2, 3, spec.hidden)
    cut = threshold_for(spec, x.view(6, -1), gate_up, 0.4)
    for form in (None, "reference"):
        got = ops.sparse_mlp(x, *packed, threshold=cut, form=form)
        want = reference(spec, x.view(6, -1), gate_up, down, threshold=cut).view(x.shape)
        assert (got - want).norm() / want.norm() < 1e-5
    chosen = torch.tensor([0, 2, 5])
    listed = dataclasses.replace(spec, select="indices")
    got = ops.sparse_mlp(x, *packed, indices=chosen)
    want = reference(listed, x.view(6, -1), gate_up, down, indices=chosen).view(x.shape)
    assert (got - want).norm() / want.norm() < 1e-5


def test_nan_is_not_hidden() -> None:
    spec = SPECS[0]
    gate_up, down = weights(spec)
    x = torch.randn(2, spec.hidden)
    x[1, 3] = torch.nan
    got = bound(spec)(x, pack(gate_up, pair=True), pack(down), threshold=0.5)
    assert got[0].isfinite().all() and got[1].isnan().all()


def test_bad_arguments_are_refused() -> None:
    spec = SPECS[3]
    gate_up, down = weights(spec)
    packed, call = (pack(gate_up, pair=True), pack(down)), bound(spec)
    x = torch.randn(2, spec.hidden).half()
    good = torch.tensor([0, 1])
    for arguments, options in (
        ((x.float(), *packed), {"indices": good}),
        ((x[:, :50], *packed), {"indices": good}),
        ((x, packed[1], packed[1]), {"indices": good}),
        ((x, packed[0], packed[0]), {"indices": good}),
        ((x, *packed), {"threshold": 1.0}),
        ((x, *packed), {"indices": torch.tensor([1, 0])}),
        ((x, *packed), {"indices": torch.tensor([0, 4])}),
        ((x, *packed), {"indices": torch.tensor([-1, 0])}),
        ((x, *packed), {"indices": torch.tensor([0, 0])}),
    ):
        with pytest.raises(UnsupportedError):
            call(*arguments, **options)
    for change in ({"activation": "tanh"}, {"select": "all"}, {"neurons": 100}, {"arithmetic": "int4"}):
        with pytest.raises(UnsupportedError):
            dataclasses.replace(spec, **change)


def test_declines_with_a_reason() -> None:
    spec = SparseMlpSpec(64, 64, WeightFormat.float(), WeightFormat.float())
    answer = TVM_CPU.decide(spec, detect())
    assert isinstance(answer, Declined) and "bfloat16" in answer.reason


def test_bytes() -> None:
    spec = SparseMlpSpec(2048, 8192, INT4, INT4)
    everything = 3 * 2048 * 8192 * 4.5 / 8
    assert spec.weight_bytes() == everything
    assert spec.weight_bytes(0) == everything / 3
    assert dataclasses.replace(spec, select="indices").weight_bytes(128) == everything / 2
