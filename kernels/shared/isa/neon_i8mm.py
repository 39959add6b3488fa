"""NEON with Armv8.6's int8 matrix products (Neoverse V1, N2, V2, Cortex-A510, A710, X2; Apple A15).

A smmla or usmmla adds 32 products: of 2 columns by 2 rows over 8 values of K. One vector alone is multiplied
by usdot and sdot.
"""

from __future__ import annotations

from typing import Any

from .. import tir
from .neon_dotprod import dot2, dot4_signed

__all__ = ["dot2", "dot4", "dot4_signed", "square"]


def dot4(lanes: int, acc: Any, u8: Any, s8: Any) -> Any:
    """usdot; with an activation broadcast from a vector of four, by element."""
    return tir.intrinsic("int32x4", "llvm.aarch64.neon.usdot.v4i32.v16i8", acc, u8, s8)


def square(acc: Any, w: Any, a: Any, unsigned: bool) -> Any:
    """acc [2 columns][2 rows] += w [2][8] . a [2][8]: usmmla where the codes `w` are unsigned, else smmla."""
    name = "usmmla" if unsigned else "smmla"
    return tir.intrinsic("int32x4", f"llvm.aarch64.neon.{name}.v4i32.v16i8", acc, w, a)
