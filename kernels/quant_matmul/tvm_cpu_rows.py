"""The first phase of the CPU form: rows of x to int8 codes with scales, or to padded fp32."""

from __future__ import annotations

from typing import Any

from ..shared import tir
from ..shared.isa.table import Isa
from ..shared.tir import T
from .packing import Geometry
from .spec import SMALLEST, QuantMatmulSpec


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


def quantize_row(isa: Isa, spec: QuantMatmulSpec, x: Any, x_at: Any, out: dict[str, Any], row: Any) -> None:
    """Emit: quantise row `row` of x (starting at element `x_at`) group by group.

    `out`: "q" int8 codes [M, Kpad], "q16" the same as int16 (either may be None), "sa" scales and
    "sc" the corrections (see `scale_entry`), "rows" the rows of a tile. NaN or Inf makes a NaN scale.
    """
    g = Geometry(spec.weight, spec.k)
    size, full = spec.weight.group_size, spec.k // spec.weight.group_size

    def one(source: Any, at: Any, group: Any) -> None:
        quantize_group(isa, spec, source, at, out, row, group)

    if full:
        with tir.loop(full) as group:
            one(x, tir.let(x_at + group * size), group)
    if full == g.groups:
        return
    padded = tir.local("float32", size)  # a short group, and those that fill the last block: zeros

    def fill(count: int) -> None:
        for v in range(size // isa.lanes):
            tir.store(padded, v * isa.lanes, tir.f32(0.0, isa.lanes))
        with tir.loop(count) as i:
            tir.store(padded, i, tir.to_f32(x, x_at + full * size + i, 1))

    short = spec.k % size
    if short:
        fill(short)
        one(padded, T.int64(0), T.int64(full))
    empty = full + (1 if short else 0)
    if empty < g.groups:
        fill(0)
        with tir.loop(g.groups - empty) as group:
            one(padded, T.int64(0), tir.let(group + empty))


def quantize_group(
    isa: Isa, spec: QuantMatmulSpec, x: Any, at: Any, out: dict[str, Any], row: Any, group: Any
) -> None:
    """Emit: quantise one group of row `row`, its values at element `at` of x (see `quantize_row`)."""
    lanes, size = isa.lanes, spec.weight.group_size
    g = Geometry(spec.weight, spec.k)
    largest, poison = tir.Register("float32", lanes), tir.Register("float32", lanes)
    largest.set(tir.f32(0.0, lanes))
    poison.set(tir.f32(0.0, lanes))
    for v in range(size // lanes):
        value = tir.let(tir.to_f32(x, at + v * lanes, lanes))
        largest.set(T.max(largest.get(), T.abs(value)))
        poison.set(poison.get() + value * tir.f32(0.0, lanes))
    top = tir.let(tir.reduce_max(largest.get()))
    usable = top >= T.float32(SMALLEST)  # below it 127 / top overflows
    inverse = tir.let(T.Select(usable, T.float32(127) / top, T.float32(0)))
    scale = tir.let(T.Select(usable, top / T.float32(127), T.float32(0)) + tir.reduce_add(poison.get()))
    total = tir.Register("int32", lanes)
    total.set(tir.i32(0, lanes))
    for v in range(size // lanes):
        code = T.nearbyint(tir.to_f32(x, at + v * lanes, lanes) * tir.splat(inverse, lanes))
        code = tir.let(tir.cast(code, "int32"))
        total.set(total.get() + code)
        where = row * (g.groups * size) + group * size + v * lanes
        if out.get("q") is not None:
            tir.store(out["q"], where, tir.cast(code, "int8"))
        if out.get("q16") is not None:
            tir.store(out["q16"], where, tir.cast(code, "int16"))
    entry = tir.let(scale_entry(row, group, g.groups, out["rows"]))
    tir.store(out["sa"], entry, scale)
    kind = correction_kind(isa, spec)
    if kind == "int":
        tir.store(out["sc"], entry, tir.reduce_add(total.get()) * T.int32(-stored_zero_point(isa, spec)))
    elif kind == "float":
        tir.store(out["sc"], entry, scale * tir.cast(tir.reduce_add(total.get()), "float32"))


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
    for name in ("q", "q16"):
        if out.get(name) is not None:
            lanes = isa.lanes
            zero = tir.splat(T.int8(0) if name == "q" else T.int16(0), lanes)
            with tir.loop(g.groups * spec.weight.group_size // lanes) as v:
                tir.store(out[name], row * (g.groups * spec.weight.group_size) + v * lanes, zero)
