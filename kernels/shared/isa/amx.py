"""AMX: bf16 tiles of 16 rows of 64 bytes; acc (16 x 16 fp32) += a (16 x 32) . b (32 x 16, rows in pairs).

`b` holds two neighbouring rows k, k + 1 of the right matrix side by side: [16][16][2]. A thread calls
`configure` before its first tile and `release` after its last: a context switch saves tiles in use.
The kernel must have granted the tile registers (`compiler.target.amx_refused`), or a load raises SIGILL.
"""

from __future__ import annotations

from typing import Any

from .. import tir
from ..tir import T

TILES = 8
_BYTES = 64  # bytes of a tile's row, its maximum


def configure(area: Any) -> None:
    """Set all tiles to 16 x 64 bytes; `area` (int64 address) has `STATE_BYTES` for this thread."""
    config = tir.buffer_at(area, "uint8")
    tir.store(config, 0, tir.splat(T.uint8(0), 64))
    tir.store(config, 0, T.uint8(1))  # palette 1
    columns = tir.buffer_at(area + 16, "uint16")
    for tile in range(TILES):
        tir.store(columns, tile, T.uint16(_BYTES))
        tir.store(config, 48 + tile, T.uint8(16))
    _call("ldtilecfg", _pointer(area))


def release() -> None:
    """Give the tiles back."""
    _call("tilerelease")


def zero(tile: int) -> None:
    """Clear a tile."""
    _call("tilezero", T.int8(tile))


def load(tile: int, address: Any, stride: int = _BYTES, passing: bool = False) -> None:
    """Load 16 rows of 64 bytes, `stride` bytes (a multiple of 4) apart; `passing` data does not claim L1."""
    _call("tileloaddt164" if passing else "tileloadd64", T.int8(tile), _pointer(address), T.int64(stride))


def store(tile: int, address: Any, stride: int = _BYTES) -> None:
    """Store 16 rows of 64 bytes, `stride` bytes (a multiple of 4) apart."""
    _call("tilestored64", T.int8(tile), _pointer(address), T.int64(stride))


def multiply(acc: int, a: int, b: int) -> None:
    """acc += a . b, accumulated in fp32; subnormal numbers count as zero."""
    _call("tdpbf16ps", T.int8(acc), T.int8(a), T.int8(b))


def to_bf16(low: Any, high: Any) -> Any:
    """Round 16 + 16 fp32 values to nearest even bf16: uint16x32."""
    both = tir.intrinsic("bfloat16x32", "llvm.x86.avx512bf16.cvtne2ps2bf16.512", high, low)
    return tir.bits(both, "uint16x32")


def _pointer(address: Any) -> Any:
    return T.address_of(tir.buffer_at(address, "uint8")[T.int64(0)])


def _call(name: str, *args: Any) -> None:
    T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{name}", *args))
