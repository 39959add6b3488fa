"""A bf16 matrix unit in plain vectors: amx.py's interface on any CPU, for checking what is composed of it."""

from __future__ import annotations

from typing import Any

from .. import tir
from ..tir import T

TILES = 8
_WORDS = 256  # 32-bit words of a tile

_tiles: list[Any] = []  # the function under construction: its tiles' memory


def configure(area: Any) -> None:
    """Keep the tiles in memory at `area` (int64 address)."""
    _tiles[:] = [area]


def release() -> None:
    """Nothing to give back."""


def zero(tile: int) -> None:
    """Clear a tile."""
    with tir.loop(16) as row:
        tir.store(_words(tile, "float32"), row * 16, tir.f32(0.0, 16))


def load(tile: int, address: Any, stride: int = 64, passing: bool = False) -> None:
    """Load 16 rows of 64 bytes, `stride` bytes (a multiple of 4) apart."""
    words = tir.buffer_at(address, "int32", align=2)
    with tir.loop(16) as row:
        tir.store(_words(tile, "int32"), row * 16, tir.load(words, row * (stride // 4), 16))


def store(tile: int, address: Any, stride: int = 64) -> None:
    """Store 16 rows of 64 bytes, `stride` bytes (a multiple of 4) apart."""
    words = tir.buffer_at(address, "int32")
    with tir.loop(16) as row:
        tir.store(words, row * (stride // 4), tir.load(_words(tile, "int32"), row * 16, 16))


def multiply(acc: int, a: int, b: int) -> None:
    """acc += a . b, pair by pair in fp32."""
    left, right, out = _words(a, "uint32"), _words(b, "uint32"), _words(acc, "float32")
    with tir.loop(16) as row, tir.loop(16) as pair:
        x = tir.splat(tir.load(left, row * 16 + pair), 16)
        y = tir.load(right, pair * 16, 16)
        value = tir.load(out, row * 16, 16) + _odd(x) * _odd(y)
        tir.store(out, row * 16, value + _even(x) * _even(y))


def to_bf16(low: Any, high: Any) -> Any:
    """Round 16 + 16 fp32 values to nearest even bf16: uint16x32."""
    halves = [tir.Register("uint16", 16) for _ in range(2)]
    for half, value in zip(halves, (low, high)):
        half.set(tir.bf16_bits(value))
    return T.Shuffle([half.get() for half in halves], [T.int32(i) for i in range(32)])


def _words(tile: int, dtype: str) -> Any:
    return tir.buffer_at(_tiles[0] + tile * (_WORDS * 4), dtype)


def _even(pair: Any) -> Any:
    return tir.bits(T.shift_left(pair, tir.splat(T.uint32(16), 16)), "float32x16")


def _odd(pair: Any) -> Any:
    return tir.bits(T.bitwise_and(pair, tir.splat(T.uint32(0xFFFF0000), 16)), "float32x16")
