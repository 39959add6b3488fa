"""bf16 matrix units: tiles moved, multiplied and rounded as torch does, on the host's unit and in vectors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from edgeformer.compiler.backends import tvm_llvm
from edgeformer.compiler.target import ISA_FEATURES, Target, detect
from edgeformer.kernels.shared.isa.table import MATRIX, by_name

HERE = [*(name for name, needed in ISA_FEATURES if needed <= detect().features), "portable16"]
everywhere = pytest.mark.parametrize("name", [name for name in HERE if name in MATRIX])
TILES = 8
STATE_BYTES = 8 << 10
LINE = 64  # bytes of a tile's row


@functools.cache
def kernel(name: str, emit: Callable[..., None], *options: Any) -> Callable[..., None]:
    """f(*addresses), with emit(unit, addresses, *options) between the unit's configuration and release."""
    from edgeformer.kernels.shared import tir

    unit = by_name(name).matrix
    k = tir.Kernel("f", [(argument, "int64") for argument in ("state", "p0", "p1", "p2", "p3")])
    unit.configure(k["state"])
    emit(unit, [k[f"p{i}"] for i in range(4)], *options)
    unit.release()
    target = detect().with_isa(name)
    function = tvm_llvm.JitLibrary(tvm_llvm.compile_module([k.finish()], target)).function("f")

    def call(*tensors: torch.Tensor) -> None:
        state = torch.full((STATE_BYTES + 64,), 255, dtype=torch.uint8)
        addresses = [t.data_ptr() for t in tensors]
        function(state.data_ptr() + -state.data_ptr() % 64, *addresses, *[0] * (4 - len(addresses)))

    return call


def with_stride(tile: torch.Tensor, stride: int) -> torch.Tensor:
    """Return a tile's 16 rows, `stride` bytes apart, between NaN."""
    wide = torch.full((16, stride // tile.element_size()), torch.nan, dtype=tile.dtype)
    wide[:, : tile.shape[1]] = tile
    return wide


def paired(right: torch.Tensor) -> torch.Tensor:
    """Return a right matrix [32, 16] with two rows side by side: [16, 32]."""
    return right.view(16, 2, 16).transpose(1, 2).reshape(16, 32)


def multiply(unit: Any, at: list[Any], strides: tuple[int, int, int, int]) -> None:
    """p3 = p2 + p0 . p1."""
    unit.load(2, at[2], strides[2])
    unit.load(5, at[0], strides[0])
    unit.load(7, at[1], strides[1])
    unit.multiply(2, 5, 7)
    unit.store(2, at[3], strides[3])


@everywhere
@pytest.mark.parametrize("strides", [(64, 64, 64, 64), (192, 128, 256, 320), (68, 132, 76, 1028)])
def test_multiply(name: str, strides: tuple[int, int, int, int]) -> None:
    for exact in (True, False):  # whole numbers: their sums fit fp32
        draw = (lambda *s: torch.randint(-9, 10, s).float()) if exact else torch.randn
        left, right, sums = draw(16, 32).bfloat16(), draw(32, 16).bfloat16(), draw(16, 16)
        out = torch.full((16, strides[3] // 4), torch.nan)
        operands = (left, paired(right), sums)
        kernel(name, multiply, strides)(*map(with_stride, operands, strides), out)
        want = sums.double() + left.double() @ right.double()
        error = (out[:, :16].double() - want).norm() / want.norm()
        assert error <= (0 if exact else 1e-6)
        assert out[:, 16:].isnan().all()


def accumulate(unit: Any, at: list[Any], count: int) -> None:
    """p2 = the sum of `count` products, every operand in the next tile."""
    unit.zero(0)
    for i in range(count):
        a, b = 1 + 2 * (i % 3), 2 + 2 * (i % 3)
        unit.load(a, at[0] + i * 1024)
        unit.load(b, at[1] + i * 1024)
        unit.multiply(0, a, b)
    unit.store(0, at[2])


@everywhere
def test_products_add_up(name: str) -> None:
    count = 7
    left, right = torch.randn(count, 16, 32).bfloat16(), torch.randn(count, 32, 16).bfloat16()
    pairs, out = torch.stack([paired(b) for b in right]), torch.full((16, 16), torch.nan)
    kernel(name, accumulate, count)(left, pairs, out)
    want = (left.double() @ right.double()).sum(0)
    assert (out.double() - want).norm() <= 1e-6 * want.norm()


def copy_all(unit: Any, at: list[Any]) -> None:
    """Fill every tile, clear the odd ones, and store them in reverse order."""
    for tile in range(TILES):
        unit.load(tile, at[0] + tile * 1024)
    for tile in range(1, TILES, 2):
        unit.zero(tile)
    for tile in reversed(range(TILES)):
        unit.store(tile, at[1] + tile * 1024)


@everywhere
def test_tiles_are_separate(name: str) -> None:
    assert by_name(name).matrix.TILES == TILES
    data = torch.randint(-(2**31), 2**31 - 1, (TILES, 16, 16), dtype=torch.int32)
    out = torch.full_like(data, 7)
    kernel(name, copy_all)(data, out)
    data[1::2] = 0
    assert torch.equal(out, data)


@everywhere
def test_nan_and_inf_stay_in_their_rows_and_columns(name: str) -> None:
    strides = (LINE, LINE, LINE, LINE)
    for value in (torch.nan, torch.inf, -torch.inf):
        left, right = torch.randn(16, 32).bfloat16(), torch.randn(32, 16).bfloat16()
        left[3, 17] = right[5, 9] = value
        out = torch.full((16, 16), torch.nan)
        kernel(name, multiply, strides)(left, paired(right), torch.zeros(16, 16), out)
        want = left.float() @ right.float()
        assert torch.equal(out.isnan(), want.isnan())
        assert torch.equal(out[want.isinf()], want[want.isinf()])
        assert out.isfinite().sum() == 15 * 15


def round_all(unit: Any, at: list[Any], count: int) -> None:
    """p1 (bf16) = p0 (fp32)."""
    from edgeformer.kernels.shared import tir

    source, out = tir.buffer_at(at[0], "float32"), tir.buffer_at(at[1], "uint16")
    with tir.loop(count) as i:
        halves = [tir.let(tir.load(source, i * 32 + half * 16, 16)) for half in range(2)]
        tir.store(out, i * 32, unit.to_bf16(*halves))


@everywhere
def test_rounding_to_bf16(name: str) -> None:
    """Every upper half, NaN and Inf among them, with lower halves around the tie: to nearest even."""
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    words = ((torch.arange(1 << 16) << 16).unsqueeze(1) + low).flatten()
    x = words[torch.randperm(len(words))].to(torch.int32).view(torch.float32)
    out = torch.full((len(x),), 7, dtype=torch.bfloat16)
    kernel(name, round_all, len(x) // 32)(x, out)
    assert torch.equal(out.isnan(), x.isnan()), "a NaN must not round to Inf"
    normal = x.abs() >= torch.finfo(torch.float32).tiny
    assert torch.equal(out[normal].view(torch.int16), x[normal].bfloat16().view(torch.int16))
    tiny = ~normal & ~x.isnan()  # subnormal numbers may count as zero, with their sign
    assert ((out == x.bfloat16()) | (out == 0))[tiny].all()
    assert torch.equal(out[tiny].signbit(), x[tiny].signbit())


def test_amx_is_one_instruction_an_operation() -> None:
    from edgeformer.kernels.shared import tir

    unit = by_name("amx").matrix
    k = tir.Kernel("f", [(argument, "int64") for argument in ("state", "p0", "p1", "p2", "p3")])
    unit.configure(k["state"])
    multiply(unit, [k[f"p{i}"] for i in range(4)], (LINE, LINE, LINE, LINE))
    round_all(unit, [k["p0"], k["p1"]], 4)
    unit.release()
    inspection = tvm_llvm.inspect([k.finish()], Target.parse("sapphirerapids"))
    counts = {"ldtilecfg": 1, "tdpbf16ps": 1, "tileloadd": 3, "tilestored": 1, "tilerelease": 1}
    assert {mnemonic: inspection.count(mnemonic) for mnemonic in counts} == counts
    assert inspection.count("vcvtne2ps2bf16") >= 1 and inspection.spills == 0
