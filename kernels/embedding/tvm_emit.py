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
        fmt = self.spec.weight
        whole = self.spec.k // fmt.group_size
        with tir.loop(whole) as group:
            self._group(group, fmt.group_size)
        if self.spec.k % fmt.group_size:
            self._group(tir.let(T.int64(whole)), self.spec.k % fmt.group_size)

    def _group(self, group: Any, size: int) -> None:
        """Decode `size` values of one group; a run of 4 bytes holds 4 values of every field of its plane."""
        fmt, g = self.spec.weight, self.geometry
        scale = self._scalar(g.scales_at(group), fmt.scale_dtype, group, False)
        zero = None
        if g.zero_bytes:
            dtype = "uint8" if fmt.torch_zero_dtype.itemsize == 1 else fmt.scale_dtype
            zero = self._scalar(g.zeros_at(group), dtype, group, True)
        codes = tir.buffer_at(tir.let(self.base + g.codes_at(group)), self._code_type)
        start = tir.let(self.out_offset + group * fmt.group_size)
        run = 4 * g.planes
        with tir.loop(size // run) as s:
            words = self._words(codes, s, 0, 4)
            for plane in range(g.planes):
                value = self._value(self._plane(words, plane), scale, zero, 4)
                tir.from_f32(self.out, start + s * run + 4 * plane, value)
        for i in range(size // run * run, size):
            byte = self._words(codes, i // run, i % 4, 1)
            value = self._value(self._plane(byte, i % run // 4), scale, zero, 1)
            tir.from_f32(self.out, start + i, value)

    @property
    def _code_type(self) -> str:
        signed = self.spec.weight.bits == 8 and "unsigned" not in self.spec.layout
        return "int8" if signed else "uint8"

    def _scalar(self, at: Any, dtype: str, group: Any, minimum: bool) -> Any:
        """Return this row's scale or zero at byte `at` of the block, with its block's factor."""
        value = self._at(self.base + at, dtype)
        if self.spec.weight.block_size:
            block = group // self.geometry.per_block
            value = value * self._at(self.base + self.geometry.factors_at(block, minimum), "float16")
        return tir.let(value)

    def _at(self, address: Any, dtype: str) -> Any:
        buffer = tir.buffer_at(tir.let(address), dtype)
        if dtype in ("uint8", "int8"):
            return tir.cast(tir.load(buffer, self.lane), "float32")
        return tir.to_f32(buffer, self.lane, 1)

    def _words(self, codes: Any, step: Any, byte: int, width: int) -> list[Any]:
        """Return, for each plane, its runs of this row of a step: `width` bytes from `byte` on."""
        fmt, g, words, before = self.spec.weight, self.geometry, [], 0
        for bits in fmt.plane_bits:
            runs = g.planes * bits // 8
            for i in range(runs):
                at = before + ((step * runs + i) * BLOCK + self.lane) * 4 + byte
                words.append((tir.let(tir.load(codes, at, width)), width))
            before += BLOCK * fmt.group_size * bits // 8
        return words

    def _plane(self, words: list[Any], p: int) -> Any:
        """Return field `p` of every plane, put together, as int32."""
        bits, *high = self.spec.weight.plane_bits
        count = 8 // bits
        code = self._field(words[p // count], p % count * bits, bits)
        if high:
            top = self._field(words[-1], p * high[0], high[0])
            code = T.bitwise_or(code, T.shift_left(top, tir.i32(bits, words[-1][1])))
        return code

    def _field(self, word: tuple[Any, int], at: int, bits: int) -> Any:
        packed, width = word
        if bits < 8:
            packed = T.shift_right(packed, tir.splat(T.uint8(at), width)) if at else packed
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
