"""The first phase of the CPU form: rows of x to int8 codes with scales, or to padded fp32."""

from __future__ import annotations

import struct
from typing import Any

from ..shared import tir
from ..shared.isa.table import Isa
from ..shared.tir import T
from .packing import Geometry
from .spec import SMALLEST, QuantMatmulSpec

_INFINITY_BITS, _NAN_BITS = 0x7F800000, 0x7FC00000
_SMALLEST_BITS = struct.unpack("<i", struct.pack("<f", SMALLEST))[0]


def stored_zero_point(isa: Isa, spec: QuantMatmulSpec) -> int:
    """Return z of sum((u - z) a) for the codes u as the layout stores them."""
    if spec.weight.bits == 8:
        return 128 if isa.int8_codes == "unsigned" else 0
    return spec.weight.zero_point


def correction_kind(isa: Isa, spec: QuantMatmulSpec) -> str:
    """Return what is kept of a group's code sum: "int" (-z * sum), "float" (scale * sum), or ""."""
    if spec.weight.zero in ("minimum", "integer"):
        return "float"
    return "int" if stored_zero_point(isa, spec) else ""


def scale_entry(row: Any, group: Any, groups: int, rows: int) -> Any:
    """Return where the scale of (row, group) stands: [row tiles][groups][rows], as a tile reads them."""
    if rows == 1:
        return row * groups + group
    tile = T.truncdiv(row, T.int64(rows))
    return tile * (groups * rows) + group * rows + T.truncmod(row, T.int64(rows))


_CODE_TYPES = {"q": "int8", "q16": "int16", "q2x8": "int8"}


def codes_of(out: dict[str, Any]) -> dict[str, Any]:
    """Return the buffers of codes among the quantiser's outputs, by layout."""
    return {name: out[name] for name in _CODE_TYPES if out.get(name) is not None}


def code_at(layout: str, row: Any, width: int, start: Any, offset: int) -> Any:
    """Return where code `start + offset` of a row stands; `width` codes a row, `start` a multiple of 8."""
    if layout != "q2x8":
        return row * width + start + offset
    pair, odd = T.truncdiv(row, T.int64(2)), T.truncmod(row, T.int64(2))
    return pair * (2 * width) + (start + offset // 8 * 8) * 2 + odd * 8 + offset % 8


def quantize_row(isa: Isa, spec: QuantMatmulSpec, x: Any, x_at: Any, out: dict[str, Any], row: Any) -> None:
    """Emit: quantise row `row` of x (from element `x_at`), as many groups together as a vector has lanes.

    `out`: int8 codes "q" [M, Kpad] or "q2x8" [M / 2, Kpad / 8, 2, 8], or "q16" as int16; "sa" scales and
    "sc" the corrections (see `scale_entry`), "rows" the rows of a tile. NaN or Inf makes a NaN scale.
    """
    g = Geometry(spec.weight, spec.k)
    size, full = spec.weight.group_size, spec.k // spec.weight.group_size
    batches = full // isa.lanes
    quantizer = _Quantizer(isa, spec, out, row)
    if batches:
        with tir.loop(batches) as batch:
            first = tir.let(batch * isa.lanes)
            quantizer.emit([(x, tir.let(x_at + (first + i) * size)) for i in range(isa.lanes)], first)
    rest = [(x, tir.let(x_at + group * size)) for group in range(batches * isa.lanes, full)]
    if full < g.groups:  # a short group, and those that fill the last block: zeros
        zeros = tir.local("float32", size)
        _clear(isa, zeros, size)
        if spec.k % size:
            padded = tir.local("float32", size)
            _clear(isa, padded, size)
            with tir.loop(spec.k % size) as i:
                tir.store(padded, i, tir.to_f32(x, x_at + full * size + i, 1))
            rest.append((padded, T.int64(0)))
        rest += [(zeros, T.int64(0))] * (g.groups - batches * isa.lanes - len(rest))
    for start in range(0, len(rest), isa.lanes):
        quantizer.emit(rest[start : start + isa.lanes], tir.let(T.int64(batches * isa.lanes + start)))


def _clear(isa: Isa, buffer: Any, size: int) -> None:
    for v in range(size // isa.lanes):
        tir.store(buffer, v * isa.lanes, tir.f32(0.0, isa.lanes))


def quantize_group(
    isa: Isa, spec: QuantMatmulSpec, x: Any, at: Any, out: dict[str, Any], row: Any, group: Any
) -> None:
    """Emit: quantise one group of row `row`, its values at element `at` of x (see `quantize_row`)."""
    _Quantizer(isa, spec, out, row).emit([(x, at)], group)


class _Quantizer:
    """Emit the int8 quantiser of up to `lanes` neighbouring groups of a row; their scales are one vector."""

    def __init__(self, isa: Isa, spec: QuantMatmulSpec, out: dict[str, Any], row: Any) -> None:
        self.isa, self.spec, self.out, self.row = isa, spec, out, row
        self.groups = Geometry(spec.weight, spec.k).groups
        self.inverse, self.scale = (tir.local("float32", isa.lanes) for _ in range(2))
        self.kind = correction_kind(isa, spec)
        self.sums = tir.local("int32" if self.kind == "int" else "float32", isa.lanes) if self.kind else None

    def emit(self, sources: list[tuple[Any, Any]], first: Any) -> None:
        """Emit groups [first, first + len(sources)), whose values start at the (buffer, element) given."""
        lanes, size = self.isa.lanes, self.spec.weight.group_size
        scale = self._scales([self._largest(*source) for source in sources])
        totals = []
        for i, (x, at) in enumerate(sources):
            inverse = tir.let(tir.splat(tir.load(self.inverse, i), lanes))
            total = tir.Register("int32", lanes)
            for v in range(size // lanes):
                code = tir.let(tir.round_to_int(tir.to_f32(x, at + v * lanes, lanes) * inverse))
                total.set(total.get() + code if v else code)
                for name, buffer in codes_of(self.out).items():
                    start = tir.let((first + i) * size)
                    where = code_at(name, self.row, self.groups * size, start, v * lanes)
                    tir.store(buffer, where, tir.cast(code, _CODE_TYPES[name]))
            totals.append(total.get())
        if self.sums is not None:
            total = tir.reduce_together(totals, lambda a, b: a + b)
            if self.kind == "int":
                tir.store(self.sums, 0, total * tir.i32(-stored_zero_point(self.isa, self.spec), lanes))
            else:
                tir.store(self.sums, 0, scale * tir.cast(total, "float32"))
        for i in range(len(sources)):
            entry = tir.let(scale_entry(self.row, tir.let(first + i), self.groups, self.out["rows"]))
            tir.store(self.out["sa"], entry, tir.load(self.scale, i))
            if self.sums is not None:
                tir.store(self.out["sc"], entry, tir.load(self.sums, i))

    def _largest(self, x: Any, at: Any) -> Any:
        """Return vectors' largest magnitudes as fp32 bits: as integers NaN > Inf > every number."""
        lanes = self.isa.lanes
        largest = tir.Register("int32", lanes)
        for v in range(self.spec.weight.group_size // lanes):
            bits = tir.bits(tir.to_f32(x, at + v * lanes, lanes), f"int32x{lanes}")
            magnitude = tir.let(T.bitwise_and(bits, tir.i32(0x7FFFFFFF, lanes)))
            largest.set(T.max(largest.get(), magnitude) if v else magnitude)
        return largest.get()

    def _scales(self, largest: list[Any]) -> Any:
        """Keep every group's scale and what its values are multiplied with; return the scales."""
        lanes = self.isa.lanes
        top = tir.let(tir.reduce_together(largest, T.max))
        magnitude, f32 = tir.let(tir.bits(top, f"float32x{lanes}")), tir.f32
        finite = top < tir.i32(_INFINITY_BITS, lanes)
        usable = T.And(finite, top >= tir.i32(_SMALLEST_BITS, lanes))  # below it 127 / top overflows
        tir.store(self.inverse, 0, T.Select(usable, f32(127.0, lanes) / magnitude, f32(0.0, lanes)))
        fallback = tir.bits(
            T.Select(finite, tir.i32(0, lanes), tir.i32(_NAN_BITS, lanes)), f"float32x{lanes}"
        )
        scale = tir.let(T.Select(usable, magnitude / f32(127.0, lanes), fallback))
        tir.store(self.scale, 0, scale)
        return scale


def widen_row(isa: Isa, spec: QuantMatmulSpec, x: Any, x_at: Any, xf: Any, row: Any, k_padded: int) -> None:
    """Emit: copy row `row` of x to fp32 [M, Kpad], the padding zero."""
    full = spec.k // isa.lanes
    with tir.loop(full) as v:
        tir.store(xf, row * k_padded + v * isa.lanes, tir.to_f32(x, x_at + v * isa.lanes, isa.lanes))
    with tir.loop(spec.k - full * isa.lanes) as i:
        tir.store(xf, row * k_padded + full * isa.lanes + i, tir.to_f32(x, x_at + full * isa.lanes + i, 1))
    with tir.loop(k_padded - spec.k) as i:
        tir.store(xf, row * k_padded + spec.k + i, T.float32(0))


def clear_row(isa: Isa, spec: QuantMatmulSpec, out: dict[str, Any], row: Any) -> None:
    """Emit: a padding row whose every product is zero."""
    g = Geometry(spec.weight, spec.k)
    with tir.loop(g.groups) as group:
        entry = tir.let(scale_entry(row, group, g.groups, out["rows"]))
        tir.store(out["sa"], entry, T.float32(0))
        if correction_kind(isa, spec):
            zero = T.int32(0) if correction_kind(isa, spec) == "int" else T.float32(0)
            tir.store(out["sc"], entry, zero)
    width = g.groups * spec.weight.group_size
    for name, buffer in codes_of(out).items():
        zero = tir.cast(tir.i32(0, isa.lanes), _CODE_TYPES[name])
        with tir.loop(width // 16) as part:
            for v in range(16 // isa.lanes):
                tir.store(buffer, code_at(name, row, width, tir.let(part * 16), v * isa.lanes), zero)
