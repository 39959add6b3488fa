"""NEON of Armv8.0 (Cortex-A53, A72): smlal adds products into int16, saddlp and addp bring them to int32."""

from __future__ import annotations

from typing import Any

from .. import tir
from ..tir import T


def dot4(lanes: int, acc: Any, u8: Any, s8: Any) -> Any:
    """smlal + smlal2: one int16 sum a byte, exact while the caller keeps to `dot4_steps`; codes up to 127."""
    return acc + _products(tir.bits(u8, "int8x16"), s8)


def widen(lanes: int, acc: Any) -> Any:
    """Add the four int16 of a lane: saddlp on both halves, then addp."""
    low, high = (_pairwise_long(_half(acc, i, 8)) for i in range(2))
    return tir.intrinsic("int32x4", "llvm.aarch64.neon.addp.v4i32", low, high)


def dot4_signed(lanes: int, acc: Any, w: Any, a: Any) -> Any:
    """smull, smull2, addp, sadalp: 2 * 128 * 127 < 32767, so a pair fits int16 even for w = -128."""
    products = tir.Register("int16", 16)
    products.set(_products(w, a))
    pairs = tir.intrinsic(
        "int16x8", "llvm.aarch64.neon.addp.v8i16", *(_half(products.get(), i, 8) for i in range(2))
    )
    return acc + _pairwise_long(pairs)


def dot2(lanes: int, acc: Any, a: Any, b: Any) -> Any:
    """smull, smull2, addp on int16."""
    products = tir.Register("int32", 8)
    products.set(tir.cast(a, "int32") * tir.cast(b, "int32"))
    halves = (_half(products.get(), i, 4) for i in range(2))
    return acc + tir.intrinsic("int32x4", "llvm.aarch64.neon.addp.v4i32", *halves)


def _products(a: Any, b: Any) -> Any:
    return tir.cast(a, "int16") * tir.cast(b, "int16")


def _pairwise_long(value: Any) -> Any:
    return tir.intrinsic("int32x4", "llvm.aarch64.neon.saddlp.v4i32.v8i16", value)


def _half(value: Any, index: int, size: int) -> Any:
    return T.Shuffle([value], [T.int32(index * size + i) for i in range(size)])
