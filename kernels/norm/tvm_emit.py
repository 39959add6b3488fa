"""The phases of norm as emitters: one row at a time, for a kernel of its own or inside a whole step."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from ..shared import tir
from ..shared.math import fold, pieces, vector_type
from ..shared.tir import T
from .spec import NormSpec

_HELD_VECTORS = 8  # a group of up to this many vectors stays in registers between absmax and codes
_INFINITY_BITS = 0x7F800000
_SMALLEST_BITS = 0x03800000  # 2^-120: a group below it counts as zero


class NormRow:
    """Emit the statistics of the row at x[offset:] now; then emit what is done with the normalised row."""

    def __init__(self, spec: NormSpec, lanes: int, accumulators: int, x: Any, offset: Any) -> None:
        self.spec, self.lanes, self.accumulators, self.x, self.offset = spec, lanes, accumulators, x, offset
        self.mean = None
        if spec.kind == "layer":
            self.mean = tir.let(self._sum(lambda v: v) / tir.f32(spec.dim))
        square_mean = self._sum(lambda v: v * v) / tir.f32(spec.dim)
        self.inverse = tir.let(tir.f32(1.0) / T.sqrt(square_mean + tir.f32(spec.eps)))

    def store(
        self,
        weight: Any,
        bias: Any,
        out: Any,
        out_offset: Any,
        residual: Any = None,
        residual_offset: Any = 0,
    ) -> None:
        """Store the normalised row plus residual[residual_offset:] to out[out_offset:] (may be x)."""
        dim, lanes = self.spec.dim, self.lanes
        main = dim // lanes * lanes

        def place(i: Any, width: int) -> None:
            value = self._value(weight, bias, i, width)
            if self.spec.residual:
                value = value + tir.to_f32(residual, residual_offset + i, width)
            tir.from_f32(out, out_offset + i, value)

        if main:
            with tir.loop(main // lanes) as i:
                place(i * lanes, lanes)
        for start, width in pieces(dim - main, lanes):
            place(main + start, width)

    def quantize(self, weight: Any, bias: Any, codes: Any, scale: Any, sums: Any, row: Any) -> None:
        """Quantise the normalised row: codes [rows, dim], scale and sums [rows, groups]."""
        dim, group = self.spec.dim, min(self.spec.group_size, self.spec.dim)
        whole = dim // group
        with tir.loop(whole) as g:
            self._quantize_group(weight, bias, codes, scale, sums, row, g, group)
        if dim % group:
            self._quantize_group(weight, bias, codes, scale, sums, row, tir.let(T.int64(whole)), dim % group)

    def _quantize_group(
        self, weight: Any, bias: Any, codes: Any, scale: Any, sums: Any, row: Any, g: Any, size: int
    ) -> None:
        start = tir.let(g * min(self.spec.group_size, self.spec.dim))
        target = tir.let(row * self.spec.dim + start)
        slot = tir.let(row * self.spec.groups + g)
        group = Group(size, self.lanes, lambda i, width: self._value(weight, bias, start + i, width))
        group.quantize(codes, target, scale, sums, slot)

    def _value(self, weight: Any, bias: Any, i: Any, width: int) -> Any:
        spec = self.spec
        factor = tir.to_f32(weight, i, width)
        if spec.weight_offset:
            factor = factor + tir.f32(spec.weight_offset, width)
        y = (self._input(i, width) * tir.splat(self.inverse, width)) * factor
        return y + tir.to_f32(bias, i, width) if spec.bias else y

    def _input(self, i: Any, width: int) -> Any:
        value = tir.to_f32(self.x, self.offset + i, width)
        return value if self.mean is None else value - tir.splat(self.mean, width)

    def _sum(self, term: Callable[[Any], Any]) -> Any:
        """Sum term(input) over the row in `accumulators` vectors, then pairwise."""
        dim, lanes, count = self.spec.dim, self.lanes, self.accumulators
        step = lanes * count
        total: Any = tir.f32(0.0)
        if dim >= step:
            sums = [tir.Register("float32", lanes) for _ in range(count)]
            for part in sums:
                part.set(tir.f32(0.0, lanes))
            with tir.loop(dim // step) as i:
                for u, part in enumerate(sums):
                    value = tir.let(self._input(i * step + u * lanes, lanes))
                    part.set(part.get() + term(value))
            parts = [part.get() for part in sums]
            while len(parts) > 1:
                parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
            total = fold(parts[0], operator.add)
        main = dim // step * step
        for start, width in pieces(dim - main, lanes):
            total = total + fold(term(tir.let(self._input(main + start, width))), operator.add)
        return tir.let(total)


class Group:
    """Emit the int8 quantiser of one group of `size` fp32 values; value(i, width) emits values i and on."""

    def __init__(self, size: int, lanes: int, value: Callable[[Any, int], Any]) -> None:
        self.size, self.lanes, self.value = size, lanes, value
        self.held = pieces(size, lanes) if size <= _HELD_VECTORS * lanes else []

    def quantize(self, codes: Any, target: Any, scale: Any, sums: Any, slot: Any) -> None:
        """Write codes[target:], scale[slot] and sums[slot]."""
        values = [(start, width, tir.let(self.value(start, width))) for start, width in self.held]
        magnitude = tir.let(self._largest(values))
        finite = magnitude < tir.i32(_INFINITY_BITS)
        absmax = tir.bits(magnitude, "float32")
        usable = T.And(finite, magnitude >= tir.i32(_SMALLEST_BITS))
        inverse = tir.let(T.Select(usable, tir.f32(127.0) / absmax, tir.f32(0.0)))
        mask = tir.let(T.Select(finite, tir.i32(-1), tir.i32(0)))  # keeps NaN and Inf from the conversion
        fallback = T.Select(finite, tir.i32(0), tir.i32(0x7FC00000))
        tir.store(scale, slot, T.Select(usable, absmax / tir.f32(127.0), tir.bits(fallback, "float32")))
        total, rest = tir.Register("int32", self.lanes), tir.Register("int32", 1)
        total.set(tir.i32(0, self.lanes))
        rest.set(tir.i32(0))

        def write(i: Any, width: int, value: Any) -> None:
            kept = T.bitwise_and(tir.bits(value, vector_type("int32", width)), tir.splat(mask, width))
            scaled = tir.bits(kept, vector_type("float32", width)) * tir.splat(inverse, width)
            code = tir.let(tir.cast(T.nearbyint(scaled), "int32"))
            tir.store(codes, target + i, tir.cast(code, "int8"))
            if width == self.lanes:
                total.set(total.get() + code)
            else:
                rest.set(rest.get() + fold(code, operator.add))

        self._each(values, write)
        tir.store(sums, slot, fold(total.get(), operator.add) + rest.get())

    def _largest(self, values: list[tuple[int, int, Any]]) -> Any:
        """The largest magnitude as fp32 bits; as integers, NaN is above Inf is above every number."""
        largest, rest = tir.Register("int32", self.lanes), tir.Register("int32", 1)
        largest.set(tir.i32(0, self.lanes))
        rest.set(tir.i32(0))

        def update(i: Any, width: int, value: Any) -> None:
            bits = tir.bits(value, vector_type("int32", width))
            magnitude = tir.let(T.bitwise_and(bits, tir.i32(0x7FFFFFFF, width)))
            if width == self.lanes:
                largest.set(T.max(largest.get(), magnitude))
            else:
                rest.set(T.max(rest.get(), fold(magnitude, T.max)))

        self._each(values, update)
        return T.max(fold(largest.get(), T.max), rest.get())

    def _each(self, values: list[tuple[int, int, Any]], visit: Callable[[Any, int, Any], None]) -> None:
        if values:
            for start, width, value in values:
                visit(start, width, value)
            return
        main = self.size // self.lanes
        with tir.loop(main) as i:
            visit(i * self.lanes, self.lanes, tir.let(self.value(i * self.lanes, self.lanes)))
        for start, width in pieces(self.size - main * self.lanes, self.lanes):
            offset = main * self.lanes + start
            visit(offset, width, tir.let(self.value(offset, width)))
