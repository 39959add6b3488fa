"""AVX-VNNI, or AVX-512 VNNI on 256 bits: one vpdpbusd adds 32 products."""

from __future__ import annotations

from typing import Any

from .. import tir
from ..tir import T


def dot4(lanes: int, acc: Any, u8: Any, s8: Any) -> Any:
    """vpdpbusd (LLVM 22 takes i8 vectors)."""
    return tir.intrinsic("int32x8", "llvm.x86.avx512.vpdpbusd.256", acc, u8, s8)


def dot4_signed(lanes: int, acc: Any, w: Any, a: Any) -> Any:
    """w + 128 as unsigned, then take 128 * sum(a) away: both by vpdpbusd."""
    offset = tir.splat(T.uint8(128), 32)
    excess = dot4(lanes, tir.i32(0, 8), offset, a)
    return dot4(lanes, acc, T.bitwise_xor(tir.bits(w, "uint8x32"), offset), a) - excess


def dot2(lanes: int, acc: Any, a: Any, b: Any) -> Any:
    """vpmaddwd and an add (LLVM folds them to vpdpwssd)."""
    return acc + tir.intrinsic("int32x8", "llvm.x86.avx2.pmadd.wd", a, b)
