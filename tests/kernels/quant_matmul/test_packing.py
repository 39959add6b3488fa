"""Packing: every layout gives back what went in, bit for bit."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch

from edgeformer.compiler.errors import UnsupportedError
from edgeformer.compiler.target import detect
from edgeformer.kernels.quant_matmul import (
    CanonicalWeight,
    PackedWeight,
    WeightFormat,
    pack,
    pack_float,
    packing,
)

INTEGER = [
    *(
        WeightFormat.int4(g, z)
        for g, z in itertools.product((32, 64, 128), ("constant", "integer", "minimum"))
    ),
    *(
        WeightFormat("int", 2, g, "float16", z)
        for g, z in ((32, "constant"), (64, "minimum"), (128, "integer"))
    ),
    *(
        WeightFormat.int8(g, z)
        for g, z in ((32, "none"), (128, "none"), (64, "constant"), (32, "integer"), (32, "minimum"))
    ),
    WeightFormat.int4(32, "minimum", "float32"),
    WeightFormat.int8(32, "none", "bfloat16"),
    *(WeightFormat("int", bits, 32, "float16", z) for bits in (5, 6) for z in ("constant", "minimum")),
    WeightFormat("int", 6, 16, "float16", "constant"),
    *(
        WeightFormat.blocked(bits, size, z)
        for bits, size, z in ((4, 32, "minimum"), (5, 32, "minimum"), (6, 16, "constant"), (2, 16, "minimum"))
    ),
    WeightFormat.blocked(4, 16, "constant"),
    WeightFormat.blocked(8, 128, "none"),
]
FORMATS = [*INTEGER, *(WeightFormat.float(d) for d in ("float32", "bfloat16", "float16"))]
SHAPES = [(1, 1), (2, 31), (31, 33), (33, 64), (64, 129), (130, 300)]


def any_bits(fmt: WeightFormat, n: int, k: int) -> CanonicalWeight:
    """A weight with every bit pattern that the format allows, extremes included."""
    shape = (n, fmt.groups(k)) if not fmt.is_float else (n, k)
    if fmt.is_float:
        return CanonicalWeight(fmt, torch.randn(shape).to(fmt.torch_dtype))
    low, high = (-128, 128) if fmt.zero == "none" else (0, 1 << fmt.bits)
    codes = torch.randint(low, high, (n, k)).to(torch.int8 if fmt.zero == "none" else torch.uint8)
    codes[0, 0], codes[-1, -1] = low, high - 1
    if fmt.block_size:
        zero = block_zero = None
        factors = (n, fmt.blocks(k))
        scale = torch.randint(-128, 256, shape).to(fmt.torch_scale_dtype)
        if fmt.zero == "minimum":
            zero, block_zero = torch.randint(0, 256, shape).to(torch.uint8), torch.randn(factors).half()
        return CanonicalWeight(fmt, codes, scale, zero, torch.randn(factors).half(), block_zero)
    scale = torch.randn(shape).to(fmt.torch_scale_dtype)
    zero = None
    if fmt.zero == "integer":
        zero = torch.randint(0, 256, shape).to(torch.uint8)
    elif fmt.zero == "minimum":
        zero = torch.randn(shape).to(fmt.torch_scale_dtype)
    return CanonicalWeight(fmt, codes, scale, zero)


def assert_same(a: CanonicalWeight, b: CanonicalWeight) -> None:
    assert a.format == b.format
    assert a.tensors().keys() == b.tensors().keys()
    for left, right in zip(a.tensors().values(), b.tensors().values()):
        assert left.dtype == right.dtype and torch.equal(left, right)


@pytest.mark.parametrize("isa", ["avx512_vnni", "avx2", "portable", "portable16"])
@pytest.mark.parametrize("fmt", FORMATS, ids=WeightFormat.key)
def test_round_trip(fmt: WeightFormat, isa: str) -> None:
    for (n, k), pair in itertools.product(SHAPES, (False, True)):
        if pair and n % 2:
            continue
        weight = any_bits(fmt, n, k)
        packed = pack(weight, detect().with_isa(isa), pair=pair)
        assert (packed.n, packed.k, packed.pair) == (n, k, pair)
        assert packed.buffer.dtype == torch.uint8 and packed.buffer.data_ptr() % 64 == 0
        assert packed.nbytes == packed.buffer.numel()
        assert_same(packed.unpack(), weight)


def test_many_blocks_are_packed_in_steps() -> None:
    weight = any_bits(WeightFormat.int4(), 40, 32 * 20_000)
    assert_same(pack(weight).unpack(), weight)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.key())
def test_a_float_weight_is_rounded_and_packed_in_steps(
    fmt: WeightFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_STEP", 1 << 13)  # some blocks at a time
    for n, k, pair in ((1, 1, False), (129, 300, False), (130, 300, True), (514, 33, True)):
        weight = torch.randn(n, k).bfloat16()
        got = pack_float(weight, fmt, pair=pair)
        want = pack(CanonicalWeight.from_float(weight, fmt), pair=pair)
        assert torch.equal(got.buffer, want.buffer) and (got.layout, got.n, got.k) == (want.layout, n, k)
        assert_same(got.unpack(), want.unpack())
    meta = pack_float(torch.empty(64, 64, device="meta"), fmt)
    assert meta.buffer.is_meta and meta.nbytes == pack_float(torch.zeros(64, 64), fmt).nbytes
    with pytest.raises(UnsupportedError, match="even"):
        pack_float(torch.zeros(3, 64), fmt, pair=True)


def test_layouts_differ_where_the_instructions_do() -> None:
    int8, int4 = (any_bits(f, 32, 32) for f in (WeightFormat.int8(), WeightFormat.int4()))
    avx2, portable = detect().with_isa("avx2"), detect().with_isa("portable")
    assert pack(int8, avx2).layout != pack(int8, portable).layout
    assert pack(int4, avx2).layout == pack(int4, portable).layout


@pytest.mark.parametrize("pair", [False, True])
def test_copies_keep_every_bit(pair: bool) -> None:
    weight = any_bits(WeightFormat.int4(zero="minimum"), 70, 50)
    packed = pack(weight, pair=pair)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert isinstance(other, PackedWeight) and other.layout == packed.layout
        assert other.buffer.data_ptr() != packed.buffer.data_ptr()
        assert_same(other.unpack(), weight)


def test_a_pair_needs_an_even_number_of_rows() -> None:
    with pytest.raises(UnsupportedError, match="even number of rows, not 33"):
        pack(any_bits(WeightFormat.int4(), 33, 32), pair=True)


def test_a_weight_that_wants_a_gradient_is_refused() -> None:
    weight = torch.randn(4, 32, requires_grad=True)
    with pytest.raises(UnsupportedError, match="no gradient.*detach"):
        pack(CanonicalWeight(WeightFormat.float("float32"), weight))
    packed = pack(CanonicalWeight.from_float(weight, WeightFormat.int8()))  # rounding detaches
    with pytest.raises(UnsupportedError, match="no gradient.*adapter"):
        packed.requires_grad_()
    assert not packed.requires_grad and packed.requires_grad_(False) is packed


@pytest.mark.parametrize("fmt", INTEGER, ids=WeightFormat.key)
def test_rounding_error_is_below_half_a_step(fmt: WeightFormat) -> None:
    w = torch.randn(9, 131)
    w[3] = 0
    canonical = CanonicalWeight.from_float(w, fmt)
    assert canonical.scale is not None
    step = canonical.group_scales().abs().repeat_interleave(fmt.group_size, 1)[:, :131]
    error = (canonical.dequantize() - w).abs()
    # Clamping (one side has a code less) and the scale's own rounding cost at most another step.
    # Integer scales and minima are whole parts of the largest of their block.
    loose = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-6, "int8": 8e-3, "uint8": 4e-3}[fmt.scale_dtype]
    largest = w.abs().amax(1, keepdim=True) if fmt.block_size else w.abs()
    assert (error <= step * 1.51 + largest * loose + 1e-6).all()
    assert canonical.dequantize()[3].abs().max() == 0


def test_rows_and_cat_lose_nothing() -> None:
    weight = any_bits(WeightFormat.int4(zero="integer"), 20, 70)
    assert_same(CanonicalWeight.cat([weight.slice_rows(0, 7), weight.slice_rows(7, 20)]), weight)
    with pytest.raises(UnsupportedError, match="cannot stack"):
        CanonicalWeight.cat([weight, any_bits(WeightFormat.int8(), 2, 70)])


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": "int", "bits": 3, "group_size": 32},
        {"dtype": "int", "bits": 4, "group_size": 48, "zero": "constant"},
        {"dtype": "int", "bits": 4, "group_size": 32, "zero": "none"},
        {"dtype": "int", "bits": 8, "group_size": 32, "zero": "maximum"},
        {"dtype": "int", "bits": 8, "group_size": 32, "scale_dtype": "int8"},
        {"dtype": "float64"},
        {"dtype": "bfloat16", "bits": 4},
    ],
)
def test_formats_that_do_not_exist_are_refused(wrong: dict) -> None:
    with pytest.raises(UnsupportedError):
        WeightFormat(**wrong)
