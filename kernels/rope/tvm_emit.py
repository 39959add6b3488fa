"""The phase of rope as an emitter: one head at one position, for a kernel of its own or a whole step."""

from __future__ import annotations

from typing import Any

from ..shared import tir
from ..shared.math import pieces
from ..shared.tir import T
from .spec import RopeSpec


def emit_rope_row(
    spec: RopeSpec,
    lanes: int,
    x: Any,
    x_offset: Any,
    cos: Any,
    sin: Any,
    table_offset: Any,
    out: Any,
    out_offset: Any,
) -> None:
    """Rotate x[x_offset:] by the tables' row at table_offset into out[out_offset:] (may be x itself)."""
    half = spec.rotary_dim // 2
    for start, width in pieces(half, lanes):
        c = tir.let(tir.load(cos, table_offset + start, width))
        s = tir.let(tir.load(sin, table_offset + start, width))
        if spec.interleaved:
            _interleaved(x, x_offset + 2 * start, c, s, out, out_offset + 2 * start, width)
        else:
            a = tir.let(tir.to_f32(x, x_offset + start, width))
            b = tir.let(tir.to_f32(x, x_offset + (half + start), width))
            tir.from_f32(out, out_offset + start, tir.let(a * c - b * s))
            tir.from_f32(out, out_offset + (half + start), tir.let(b * c + a * s))
    for start, width in pieces(spec.head_dim - spec.rotary_dim, lanes):
        at = spec.rotary_dim + start
        tir.store(out, out_offset + at, tir.load(x, x_offset + at, width))


def _interleaved(x: Any, x_offset: Any, c: Any, s: Any, out: Any, out_offset: Any, width: int) -> None:
    if width == 1:
        a, b = (tir.let(tir.to_f32(x, x_offset + i, 1)) for i in (0, 1))
        tir.from_f32(out, out_offset, tir.let(a * c - b * s))
        tir.from_f32(out, out_offset + 1, tir.let(b * c + a * s))
        return
    pairs = tir.let(tir.to_f32(x, x_offset, 2 * width))
    a = tir.let(T.Shuffle([pairs], [T.int32(2 * i) for i in range(width)]))
    b = tir.let(T.Shuffle([pairs], [T.int32(2 * i + 1) for i in range(width)]))
    first, second = tir.let(a * c - b * s), tir.let(b * c + a * s)
    order = [T.int32(i // 2 + (width if i % 2 else 0)) for i in range(2 * width)]
    tir.from_f32(out, out_offset, tir.let(T.Shuffle([first, second], order)))
