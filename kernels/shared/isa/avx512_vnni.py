"""AVX-512 with VNNI: one vpdpbusd adds 64 products."""

from __future__ import annotations

from typing import Any

from .. import tir
from ..tir import T
from .avx512 import fraction, scale

__all__ = ["dot2", "dot4", "dot4_signed", "fraction", "scale"]


def dot4(lanes: int, acc: Any, u8: Any, s8: Any) -> Any:
    """vpdpbusd (LLVM 22 takes i8 vectors)."""
    return tir.intrinsic("int32x16", "llvm.x86.avx512.vpdpbusd.512", acc, u8, s8)


def dot4_signed(lanes: int, acc: Any, w: Any, a: Any) -> Any:
    """w + 128 as unsigned, then take 128 * sum(a) away: both by vpdpbusd."""
    flipped = T.bitwise_xor(tir.bits(w, "uint8x64"), tir.splat(T.uint8(128), 64))
    excess = dot4(lanes, tir.i32(0, 16), tir.splat(T.uint8(128), 64), a)
    return dot4(lanes, acc, flipped, a) - excess


def dot2(lanes: int, acc: Any, a: Any, b: Any) -> Any:
    """vpmaddwd and an add (LLVM folds them to vpdpwssd)."""
    return acc + tir.intrinsic("int32x16", "llvm.x86.avx512.pmaddw.d.512", a, b)


def widen(lanes: int, acc: Any) -> Any:
    """Nothing to do: vpdpbusd accumulates in int32."""
    return acc
