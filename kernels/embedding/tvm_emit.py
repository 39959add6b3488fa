"""The phase of embedding as an emitter: one row of a packed table, for its own kernel or a whole step."""

from __future__ import annotations

from typing import Any

from ..quant_matmul.packing import BLOCK, Geometry
from ..shared import tir
from ..shared.tir import T
from .spec import EmbeddingSpec


class PackedRow:
    """Emit the decoding of row `row` of the table at an int64 address into out[out_offset:]."""

    def __init__(self, spec: EmbeddingSpec, table: Any, row: Any, out: Any, out_offset: Any) -> None:
        self.spec, self.geometry = spec, Geometry(spec.weight, spec.k)
        self.out, self.out_offset = out, out_offset
        block = tir.let(T.shift_right(row, T.int64(5)))
        self.lane = tir.let(T.bitwise_and(row, T.int64(BLOCK - 1)))
        self.base = tir.let(table + block * self.geometry.block_bytes)
        if spec.weight.is_float:
            self._float_row()
        else:
            self._quantized_row()

    def _float_row(self) -> None:
        values = tir.buffer_at(self.base, self.spec.weight.dtype)
        with tir.loop(self.spec.k) as i:
            value = tir.to_f32(values, i * BLOCK + self.lane, 1)
            tir.from_f32(self.out, self.out_offset + i, tir.let(self._times_factor(value, 1)))

    def _quantized_row(self) -> None:
        fmt, g = self.spec.weight, self.geometry
        whole = self.spec.k // fmt.group_size
        with tir.loop(whole) as group:
            self._group(group, fmt.group_size)
        if self.spec.k % fmt.group_size:
            self._group(tir.let(T.int64(g.groups - 1)), self.spec.k % fmt.group_size)

    def _group(self, group: Any, size: int) -> None:
        """Decode `size` values of one group; a run of 4 bytes holds 4 values of every plane."""
        fmt, g = self.spec.weight, self.geometry
        base = tir.let(self.base + group * g.group_bytes)
        scale = self._scalar(base + g.code_bytes, fmt.scale_dtype)
        shift = {"integer": "uint8", "minimum": fmt.scale_dtype}.get(fmt.zero)
        zero = self._scalar(base + (g.code_bytes + g.scale_bytes), shift) if shift else None
        codes = tir.buffer_at(base, self._code_type)
        start = tir.let(self.out_offset + group * fmt.group_size)
        run = 4 * g.planes
        with tir.loop(size // run) as s:
            word = tir.let(tir.load(codes, (s * BLOCK + self.lane) * 4, 4))
            for plane in range(g.planes):
                value = self._value(self._plane(word, plane, 4), scale, zero, 4)
                tir.from_f32(self.out, start + s * run + 4 * plane, value)
        for i in range(size // run * run, size):
            byte = tir.let(tir.load(codes, (self.lane + (i // run) * BLOCK) * 4 + i % 4, 1))
            value = self._value(self._plane(byte, i % run // 4, 1), scale, zero, 1)
            tir.from_f32(self.out, start + i, value)

    @property
    def _code_type(self) -> str:
        signed = self.spec.weight.bits == 8 and "unsigned" not in self.spec.layout
        return "int8" if signed else "uint8"

    def _scalar(self, address: Any, dtype: str) -> Any:
        buffer = tir.buffer_at(tir.let(address), dtype)
        return tir.let(
            tir.cast(tir.load(buffer, self.lane), "float32") if dtype == "uint8" else self._f32(buffer)
        )

    def _f32(self, buffer: Any) -> Any:
        return tir.to_f32(buffer, self.lane, 1)

    def _plane(self, packed: Any, plane: int, width: int) -> Any:
        bits = self.spec.weight.bits
        if bits < 8:
            packed = T.shift_right(packed, tir.splat(T.uint8(plane * bits), width)) if plane else packed
            packed = T.bitwise_and(packed, tir.splat(T.uint8((1 << bits) - 1), width))
        return tir.cast(packed, "int32")

    def _value(self, code: Any, scale: Any, zero: Any, width: int) -> Any:
        """scale * (code - zero point) with the constant offset of the layout taken off in int32."""
        fmt = self.spec.weight
        offset = fmt.zero_point
        if fmt.bits == 8:  # signed bytes hold code - 128 of unsigned codes, unsigned bytes code + 128
            signed = self._code_type == "int8"
            offset += {(True, False): -128, (False, True): 128}.get((signed, fmt.zero == "none"), 0)
        value = tir.cast(code - tir.i32(offset, width) if offset else code, "float32")
        if fmt.zero == "integer":
            value = value - tir.splat(zero, width)
        value = value * tir.splat(scale, width)
        value = value + tir.splat(zero, width) if fmt.zero == "minimum" else value
        return tir.let(self._times_factor(value, width))

    def _times_factor(self, value: Any, width: int) -> Any:
        factor = self.spec.factor
        return value if factor == 1.0 else value * tir.f32(factor, width)
