"""AVX-512 (F, BW, DQ) without VNNI: vpmaddubsw adds pairs of products in int16, vpmaddwd makes them int32."""

from __future__ import annotations

from typing import Any

from .. import tir
from ..tir import T


def dot4(lanes: int, acc: Any, u8: Any, s8: Any) -> Any:
    """vpmaddubsw + vpaddw: int16 x 32, exact while the caller keeps to `dot4_steps`."""
    return acc + _pairs(u8, s8)


def widen(lanes: int, acc: Any) -> Any:
    """Add the int16 pairs: vpmaddwd with ones."""
    return tir.intrinsic("int32x16", "llvm.x86.avx512.pmaddw.d.512", acc, tir.splat(T.int16(1), 32))


def dot4_signed(lanes: int, acc: Any, w: Any, a: Any) -> Any:
    """|w| * (a, negated where w < 0): 128 * 127 * 2 < 32767, so no sum saturates even for w = -128."""
    zero = tir.splat(T.int8(0), 64)
    magnitude = tir.bits(T.Select(w < zero, zero - w, w), "uint8x64")
    return acc + widen(lanes, _pairs(magnitude, T.Select(w < zero, zero - a, a)))


def dot2(lanes: int, acc: Any, a: Any, b: Any) -> Any:
    """vpmaddwd + vpaddd."""
    return acc + tir.intrinsic("int32x16", "llvm.x86.avx512.pmaddw.d.512", a, b)


def fraction(x: Any) -> Any:
    """x - floor(x) of 16 fp32 values, exact (vreduceps)."""
    return tir.intrinsic(
        "float32x16", "llvm.x86.avx512.mask.reduce.ps.512", x, T.int32(1), x, T.int16(-1), T.int32(4)
    )


def scale(p: Any, x: Any) -> Any:
    """p * 2**floor(x) of 16 fp32 values (vscalefps)."""
    return tir.intrinsic("float32x16", "llvm.x86.avx512.mask.scalef.ps.512", p, x, p, T.int16(-1), T.int32(4))


def _pairs(u8: Any, s8: Any) -> Any:
    return tir.intrinsic("int16x32", "llvm.x86.avx512.pmaddubs.w.512", u8, s8)
