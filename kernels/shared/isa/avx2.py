"""AVX2: vpmaddubsw adds pairs of products into int16, vpmaddwd brings them to int32."""

from __future__ import annotations

from typing import Any

from .. import tir
from ..tir import T


def dot4(lanes: int, acc: Any, u8: Any, s8: Any) -> Any:
    """vpmaddubsw + vpaddw: int16 x 16, exact while the caller keeps to `dot4_steps`."""
    return acc + tir.intrinsic("int16x16", "llvm.x86.avx2.pmadd.ub.sw", u8, s8)


def widen(lanes: int, acc: Any) -> Any:
    """Add the int16 pairs: vpmaddwd with ones."""
    return tir.intrinsic("int32x8", "llvm.x86.avx2.pmadd.wd", acc, tir.splat(T.int16(1), 16))


def dot4_signed(lanes: int, acc: Any, w: Any, a: Any) -> Any:
    """|w| * sign(w)a: 128 * 127 * 2 < 32767, so no sum saturates even for w = -128."""
    magnitude = tir.bits(T.Select(w < tir.splat(T.int8(0), 32), tir.splat(T.int8(0), 32) - w, w), "uint8x32")
    pairs = tir.intrinsic("int16x16", "llvm.x86.avx2.pmadd.ub.sw", magnitude, _sign(a, w))
    return acc + widen(lanes, pairs)


def _sign(a: Any, w: Any) -> Any:
    return tir.intrinsic("int8x32", "llvm.x86.avx2.psign.b", a, w)


def dot2(lanes: int, acc: Any, a: Any, b: Any) -> Any:
    """vpmaddwd + vpaddd."""
    return acc + tir.intrinsic("int32x8", "llvm.x86.avx2.pmadd.wd", a, b)
