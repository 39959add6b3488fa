"""NEON with Armv8.2's dot product (Cortex-A55, A76, Neoverse N1, Apple A12): an sdot adds 16 products."""

from __future__ import annotations

from typing import Any

from .. import tir
from .neon import dot2

__all__ = ["dot2", "dot4", "dot4_signed"]


def dot4(lanes: int, acc: Any, u8: Any, s8: Any) -> Any:
    """sdot: codes up to 127 are the same signed."""
    return dot4_signed(lanes, acc, tir.bits(u8, "int8x16"), s8)


def dot4_signed(lanes: int, acc: Any, w: Any, a: Any) -> Any:
    """sdot; with an activation broadcast from a vector of four, by element."""
    return tir.intrinsic("int32x4", "llvm.aarch64.neon.sdot.v4i32.v16i8", acc, w, a)
