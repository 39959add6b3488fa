"""The large matmul on a bf16 matrix unit where K comes in slices, and the scratch memory that it takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from edgeformer.compiler.target import detect
from edgeformer.kernels.quant_matmul import PackedWeight, QuantMatmulSpec, WeightFormat, pack
from edgeformer.kernels.quant_matmul import bind as bind_module
from edgeformer.kernels.quant_matmul.reference import quant_matmul as reference
from edgeformer.kernels.quant_matmul.sizes import matrix_plan, padded_k, panel_bytes

from ..conftest import GuardedMemory
from .conftest import UNITS, Guarded, bound, compare, inputs, random_weight

INT4, MINIMUM = WeightFormat.int4(), WeightFormat.int4(128, "minimum")
BRAIN, HALF = WeightFormat.float("bfloat16"), WeightFormat.float("float16")
PAIR = {"epilogue": "silu_pair", "bias": True, "residual": True}
# Blocks of columns that share a slice and a last, smaller share; one value in the last slice; an odd K.
DEEP = [
    QuantMatmulSpec(539, 1700, INT4, "bfloat16"),
    QuantMatmulSpec(1060, 2060, MINIMUM, "bfloat16", "bfloat16", **PAIR),
    QuantMatmulSpec(70, 1153, BRAIN, "bfloat16", bias=True),
    QuantMatmulSpec(66, 2049, HALF, "bfloat16", "float16", **PAIR),
]
FLAT = [
    QuantMatmulSpec(33, 640, WeightFormat.int8(128), "bfloat16", residual=True),
    QuantMatmulSpec(66, 605, BRAIN, "bfloat16", epilogue="silu_pair"),
]
everywhere = pytest.mark.parametrize("isa", UNITS)
every_spec = pytest.mark.parametrize(  # on the second unit a few, the rest is slow: it compiles
    ("isa", "spec"),
    [
        pytest.param(
            isa, spec, marks=[] if few else [pytest.mark.slow], id=f"{isa}-{spec.key().replace(' ', '-')}"
        )
        for isa in UNITS
        for spec in (*DEEP, *FLAT)
        for few in [isa == UNITS[0] or spec in (DEEP[0], DEEP[2])]
    ],
)


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@every_spec
def test_against_the_reference(isa: str, spec: QuantMatmulSpec, guarded: Guarded) -> None:
    assert (matrix_plan(spec).depth < padded_k(spec)) == (spec in DEEP)
    compare(isa, spec, random_weight(spec), (1, 17, 32, 513, 530), guarded)


@everywhere
@pytest.mark.parametrize("column", [0, 575, 576, 1699])
def test_nan_and_inf_stay_in_their_rows(isa: str, column: int) -> None:
    """In the first and the last value of each slice."""
    spec = DEEP[0]
    weight = random_weight(spec)
    call, packed = bound(isa, spec), pack(weight, detect().with_isa(isa))
    x, _, _ = inputs(spec, 40)
    clean, bad = call(x, packed, None, None), x.clone()
    bad[3, column], bad[16, column], bad[39, column] = torch.nan, torch.inf, -torch.inf
    got, want = call(bad, packed, None, None), reference(spec, bad, weight)
    hit = torch.tensor([3, 16, 39])
    others = torch.ones(40, dtype=torch.bool).index_fill_(0, hit, False)
    assert torch.equal(got[others], clean[others]) and clean.isfinite().all()
    assert not got[hit].isfinite().any()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[hit].nan_to_num(), want[hit].nan_to_num())


@everywhere
def test_the_result_does_not_depend_on_threads(isa: str) -> None:
    spec = DEEP[0]
    call, packed = bound(isa, spec), pack(random_weight(spec), detect().with_isa(isa))
    x, _, _ = inputs(spec, 50)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(call(x, packed, None, None))
    assert all(torch.equal(results[0], result) for result in results)


@every_spec
@pytest.mark.parametrize("count", [1, 3])
def test_scratch_is_as_large_as_what_is_used(
    isa: str, spec: QuantMatmulSpec, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(count)
    held: list[torch.Tensor] = []

    def exactly(nbytes: int) -> int:
        held.append(torch.full((nbytes + 3 * 4096,), 0xA5, dtype=torch.uint8))
        start = -held[-1].data_ptr() % 4096 + 4096
        held.append(held[-1][start + nbytes :])
        held.append(held[-2][:start])
        return held[0].data_ptr() + start

    weight = random_weight(spec)
    packed = pack(weight, detect().with_isa(isa), pair=spec.pair)
    call = bound(isa, spec)
    monkeypatch.setattr(bind_module, "scratch", exactly)
    for m in (3, 530 if spec in DEEP else 40):
        held.clear()
        call(inputs(spec, m)[0], packed, *inputs(spec, m)[1:])
        assert len(held) == 3
        assert (held[1] == 0xA5).all() and (held[2] == 0xA5).all(), "written outside of the scratch memory"


@every_spec
def test_nothing_past_the_end_is_read(isa: str, spec: QuantMatmulSpec, guarded_memory: GuardedMemory) -> None:
    weight = random_weight(spec)
    packed = pack(weight, detect().with_isa(isa), pair=spec.pair)
    last = PackedWeight(guarded_memory.copy(packed.buffer), spec.weight, spec.n, spec.k, packed.layout)
    for m in (5, 17, 33):
        arguments = inputs(spec, m)
        want = bound(isa, spec)(arguments[0], packed, *arguments[1:])
        x, bias, residual = (None if t is None else guarded_memory.copy(t) for t in arguments)
        assert torch.equal(bound(isa, spec)(x, last, bias, residual), want)


def all_specs() -> Iterator[QuantMatmulSpec]:
    formats = [WeightFormat.int4(size) for size in (32, 64, 128)] + [BRAIN]
    for n, k in itertools.product((1, 64, 500, 576, 4096, 151_936), (1, 576, 1536, 1537, 1568, 3000, 11008)):
        for weight, epilogue in itertools.product(formats, ("none", "silu_pair")):
            yield QuantMatmulSpec(2 * n, k, weight, "bfloat16", epilogue=epilogue)


def test_the_cut_of_k_fits_the_tiles_the_groups_and_l2() -> None:
    for spec in all_specs():
        plan, k = matrix_plan(spec), padded_k(spec)
        assert k % 32 == 0 and plan.depth % 32 == 0 and plan.units >= 1 and plan.row_tiles >= 1
        assert plan.depth % max(1, spec.weight.group_size) == 0, "a group lies in one slice"
        assert plan.depth == k if k <= 640 else 320 < plan.depth <= 640
        assert plan.depth * 32 * 2 <= 40 << 10, "a panel stays in an L1 of 48 KiB"
        rows, panels = 512 * plan.depth * 2, panel_bytes(spec, "amx")
        assert rows + panels < 2 << 20 and panels % 64 == 0, spec.key()
