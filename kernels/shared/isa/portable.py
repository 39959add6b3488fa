"""Any LLVM CPU: the same dot products in plain integer vectors (shift, multiply, add)."""

from __future__ import annotations

from typing import Any

from .. import tir
from ..tir import T


def _byte(value: Any, j: int, signed: bool, lanes: int) -> Any:
    """Byte j of every 32-bit lane, extended to int32."""
    if signed:
        up = T.shift_left(value, tir.i32(24 - 8 * j, lanes)) if j < 3 else value
        return T.shift_right(up, tir.i32(24, lanes))
    down = T.shift_right(value, tir.i32(8 * j, lanes)) if j else value
    return T.bitwise_and(down, tir.i32(255, lanes))


def dot4(lanes: int, acc: Any, u8: Any, s8: Any) -> Any:
    """Four multiplies and adds on 32-bit lanes."""
    u, s = tir.bits(u8, f"int32x{lanes}"), tir.bits(s8, f"int32x{lanes}")
    for j in range(4):
        acc = acc + _byte(u, j, False, lanes) * _byte(s, j, True, lanes)
    return acc


def dot4_signed(lanes: int, acc: Any, w: Any, a: Any) -> Any:
    """As dot4 with both operands signed."""
    u, s = tir.bits(w, f"int32x{lanes}"), tir.bits(a, f"int32x{lanes}")
    for j in range(4):
        acc = acc + _byte(u, j, True, lanes) * _byte(s, j, True, lanes)
    return acc


def dot2(lanes: int, acc: Any, a: Any, b: Any) -> Any:
    """Two multiplies and adds on 32-bit lanes."""
    x, y = tir.bits(a, f"int32x{lanes}"), tir.bits(b, f"int32x{lanes}")
    high = tir.i32(16, lanes)
    low = lambda v: T.shift_right(T.shift_left(v, high), high)  # noqa: E731
    return acc + low(x) * low(y) + T.shift_right(x, high) * T.shift_right(y, high)


def widen(lanes: int, acc: Any) -> Any:
    """Nothing to do: the accumulator is int32."""
    return acc
