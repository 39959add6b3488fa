"""The packed bytes of a block as a kernel reads them: codes plane by plane, scales, floats."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..shared import tir
from ..shared.isa.table import Isa
from ..shared.tir import T
from .packing import BLOCK, Geometry
from .space import L1, L2, PAST, prefetch_names
from .spec import QuantMatmulSpec


@dataclass(frozen=True)
class Prefetch:
    """How far ahead weights are asked for, in bytes (0: not at all), and how near the core (3: L1, 1: L2).

    `near` is how far ahead lines that wait in L2 are asked into L1 as well (0: never).
    """

    distance: int = 0
    locality: int = 3
    near: int = 0

    @staticmethod
    def of(configuration: Mapping[str, Any], rows: int, bits: int = 0) -> Prefetch:
        """Return what is configured for so many rows; among several formats, for weights of so many bits."""
        if bits == 8 and configuration.get("prefetch_int8") == 0:
            return Prefetch()
        return Prefetch(*(int(configuration[name]) for name in prefetch_names(rows > 1)))

    def kept(self) -> Prefetch:
        """Return the same for bytes that are read more than once: past the caches they would come twice."""
        return replace(self, locality=L2) if self.locality == PAST else self

    @property
    def levels(self) -> list[tuple[int, int]]:
        """Distance and place of each prefetch of a line, the farthest first."""
        far = [(self.distance, self.locality)] if self.distance else []
        return far + ([(self.near, L1)] if self.near else [])


@dataclass
class Stream:
    """The packed bytes of one block, as the views that tiles load from; `at` is the block's byte offset."""

    isa: Isa
    spec: QuantMatmulSpec
    views: dict[str, Any]
    at: Any
    # Factors of the block of inputs at hand, by vector and whether they are the minima's.
    _held: dict[tuple[int, bool], Any] = field(init=False, default_factory=dict)
    # Prefetches of the group at hand that are still to be emitted: address and place.
    _ahead: list[tuple[Any, int]] = field(init=False, default_factory=list)

    @staticmethod
    def views_of(spec: QuantMatmulSpec, address: Any) -> dict[str, Any]:
        """Return the views of a packed weight at an int64 address."""
        fmt = spec.weight
        scales = tir.buffer_at(address, fmt.dtype if fmt.is_float else fmt.scale_dtype)
        views = {"u8": tir.buffer_at(address, "uint8"), "scale": scales}
        if fmt.block_size:
            views["factor"] = tir.buffer_at(address, "float16")
        return views

    @property
    def geometry(self) -> Geometry:
        """Sizes of the layout."""
        return Geometry(self.spec.weight, self.spec.k)

    @contextlib.contextmanager
    def each_group(self, ahead: Prefetch, vectors: Sequence[int]) -> Iterator[Any]:
        """Emit a loop over the groups of a row, with prefetches: those that `prefetch_some` left come last.

        The factors of a block's scales stay in registers for these vectors.
        """
        g = self.geometry
        if not self.spec.weight.block_size:
            with tir.loop(g.groups) as group:
                self._ahead = self._lines_ahead(group, ahead)
                yield group
                self.prefetch_some(1)
            return
        kinds = (False, True) if g.zero_bytes else (False,)
        held = {(v, kind): tir.Register("float32", self.isa.lanes) for v in vectors for kind in kinds}
        with tir.loop(g.groups // g.per_block) as block:
            for (vector, kind), register in held.items():
                register.set(self._factor(block, vector, kind))
            self._held = held
            with tir.loop(g.per_block) as inside:
                group = tir.let(block * g.per_block + inside)
                self._ahead = self._lines_ahead(group, ahead)
                yield group
                self.prefetch_some(1)
            self._held = {}

    def raw(self, group: Any, step: Any, vector: Any) -> list[Any]:
        """Return the code bytes of a step and vector: for each plane its runs of 4*lanes bytes."""
        g, loads, before = self.geometry, [], 0
        base = self.at + g.codes_at(group)
        for bits in g.format.plane_bits:
            runs = g.planes * bits // 8
            for i in range(runs):
                offset = base + before + ((step * runs + i) * BLOCK + vector * self.isa.lanes) * 4
                loads.append(tir.let(tir.load(self.views["u8"], offset, 4 * self.isa.lanes)))
            before += BLOCK * g.format.group_size * bits // 8
        return loads

    def plane(self, raw: list[Any], p: int) -> Any:
        """Return the codes of dot product `p` of a step, one a byte."""
        bits, *high = self.spec.weight.plane_bits
        count = 8 // bits
        code = self._field(raw[p // count], p % count * bits, bits, 0)
        if high:
            code = T.bitwise_or(code, self._field(raw[-1], p * high[0], high[0], bits))
        return code

    def _field(self, raw: Any, at: int, bits: int, to: int) -> Any:
        """Return `bits` bits of every byte, moved from bit `at` to bit `to`."""
        n = 4 * self.isa.lanes
        if at > to:
            raw = T.shift_right(raw, tir.splat(T.uint8(at - to), n))
        elif at < to:
            raw = T.shift_left(raw, tir.splat(T.uint8(to - at), n))
        if at + bits == 8 and to == 0:
            return raw
        return T.bitwise_and(raw, tir.splat(T.uint8(((1 << bits) - 1) << to), n))

    def scale(self, group: Any, vector: Any) -> Any:
        """Return fp32 scales of a vector of columns."""
        g = self.geometry
        return self._values(group, g.scales_at(group), vector, False)

    def zero(self, group: Any, vector: Any) -> Any:
        """Return fp32 minima, or zero points, of a vector of columns."""
        at = self.geometry.zeros_at(group)
        if self.spec.weight.zero == "minimum" and not self.spec.weight.block_size:
            return self._values(group, at, vector, True)
        codes = tir.load(self.views["u8"], self.at + at + vector * self.isa.lanes, self.isa.lanes)
        codes = tir.cast(codes, "float32")
        return codes * self._factor_of(group, vector, True) if self.spec.weight.block_size else codes

    def _values(self, group: Any, at: Any, vector: Any, zero: bool) -> Any:
        fmt, lanes = self.spec.weight, self.isa.lanes
        first = (self.at + at) // fmt.torch_scale_dtype.itemsize + vector * lanes
        if not fmt.block_size:
            return tir.to_f32(self.views["scale"], first, lanes)
        codes = tir.cast(tir.load(self.views["scale"], first, lanes), "float32")
        return codes * self._factor_of(group, vector, zero)

    def _factor_of(self, group: Any, vector: Any, minimum: bool) -> Any:
        held = self._held.get((vector, minimum))
        return held.get() if held else self._factor(group // self.geometry.per_block, vector, minimum)

    def _factor(self, block: Any, vector: Any, minimum: bool) -> Any:
        at = (self.at + self.geometry.factors_at(block, minimum)) // 2 + vector * self.isa.lanes
        return tir.to_f32(self.views["factor"], at, self.isa.lanes)

    def prefetch_some(self, parts: int) -> None:
        """Emit one of `parts` equal parts of the group's prefetches that are left.

        In a burst they take all of L1's outstanding lines, and the loads behind them wait.
        """
        now = -(-len(self._ahead) // parts)
        for at, place in self._ahead[:now]:
            tir.prefetch(self.views["u8"], at, place)
        self._ahead = self._ahead[now:]

    def _lines_ahead(self, group: Any, ahead: Prefetch) -> list[tuple[Any, int]]:
        """Return the lines that lie so far ahead of one group's."""
        size = self.geometry.group_bytes
        return [
            (self._ahead_at(group * size + line + distance), place)
            for line in range(0, size, 64)
            for distance, place in ahead.levels
        ]

    def _ahead_at(self, offset: Any) -> Any:
        """Return what is read when a block's bytes have been read up to `offset`: what lies there."""
        return self.at + offset


def group_values(stream: Stream, group: Any, vector: Any) -> tuple[Any, Any]:
    """Return the fp32 scales of a group, and its minima or zero points (None without), in registers."""
    found = [stream.scale(group, vector), stream.zero(group, vector) if stream.geometry.zero_bytes else None]
    held: list[Any] = [None, None]
    for i, value in enumerate(found):
        if value is not None:
            held[i] = tir.Register("float32", stream.isa.lanes)
            held[i].set(value)
    return held[0].get(), held[1].get() if held[1] else None


def float_weights(
    stream: Stream, group: Any, step: Any, vector: Any, of_group: tuple[Any, Any] | None = None
) -> list[Any]:
    """Return the fp32 weights of one step and vector, in the order of k (4 * planes of them).

    `of_group` is what `group_values` returned, where it is at hand.
    """
    fmt, lanes = stream.spec.weight, stream.isa.lanes
    scale, zero = of_group or group_values(stream, group, vector)
    signed = fmt.bits == 8 and stream.isa.int8_codes == "signed"
    shift = 128 if fmt.bits == 8 and not signed else (0 if fmt.bits == 8 else fmt.zero_point)
    values = []
    for code in _codes(stream, stream.raw(group, step, vector), signed):
        if shift and zero is None:
            code = code - tir.i32(shift, lanes)
        value = tir.cast(code, "float32")
        if fmt.zero == "minimum":
            values.append(tir.let(value * scale + zero))
        elif fmt.zero == "integer":
            values.append(tir.let((value - zero) * scale))
        else:
            values.append(tir.let(value * scale))
    return values


def _codes(stream: Stream, raw: list[Any], signed: bool) -> Iterator[Any]:
    """Yield the codes of one step as int32 vectors, in the order of k."""
    fmt, lanes = stream.spec.weight, stream.isa.lanes
    words = lambda code: tir.let(tir.bits(code, f"int32x{lanes}"))  # noqa: E731
    whole = len(fmt.plane_bits) > 1  # bytes are put together first, then taken apart
    held = None if whole else words(raw[0])
    for p in range(stream.geometry.planes):
        word = words(stream.plane(raw, p)) if whole else held
        for j in range(4):
            if signed:
                up = T.shift_left(word, tir.i32(24 - 8 * j, lanes)) if j < 3 else word
                yield T.shift_right(up, tir.i32(24, lanes))
                continue
            down, mask = (8 * j, 255) if whole else (8 * j + p * fmt.bits, (1 << fmt.bits) - 1)
            moved = T.shift_right(word, tir.i32(down, lanes)) if down else word
            yield T.bitwise_and(moved, tir.i32(mask, lanes))


def float_element(stream: Stream, k: Any, vector: int) -> Any:
    """Return one row of a block of a float weight as fp32."""
    size = stream.geometry.block_bytes // (BLOCK * stream.spec.k)
    return tir.to_f32(
        stream.views["scale"], stream.at // size + k * BLOCK + vector * stream.isa.lanes, stream.isa.lanes
    )
