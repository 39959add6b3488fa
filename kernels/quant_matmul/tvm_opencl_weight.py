"""Weights of the `n32` layout on a device: each work-item reads 16 bytes, the next one the 16 behind them."""

from __future__ import annotations

from typing import Any

from ..shared import device_tir as d
from .packing import BLOCK, Geometry
from .weight_format import WeightFormat

WEIGHT_ARGS = (("w", "*uint32x4"), ("w2", "*uint32x2"), ("w1", "*uint32"))  # one buffer, by its three widths


class WeightReader:
    """Decodes vectors of 16 bytes of one block of 32 columns.

    Vector v of an integer block holds `depth` inputs of 4 columns (quad v % 8); of a float block one input of
    4 columns (fp32) or 8.
    """

    def __init__(self, fmt: WeightFormat, columns: int, k: d.DeviceKernel) -> None:
        self.fmt, self.geometry, self._k = fmt, Geometry(fmt, columns), k
        if fmt.is_float:
            self.depth, self.quads = 1, 1 if fmt.dtype == "float32" else 2
            self.per_row = 8 // self.quads  # vectors that hold one row of columns
            self.total = columns * self.per_row
            return
        self.depth, self.quads, self.per_row = 4 * (8 // fmt.plane_bits[0]), 1, 8
        self.per_group = 8 * (fmt.group_size // self.depth)
        self.total = self.geometry.groups * self.per_group

    def split(self, v: Any) -> tuple[Any, Any]:
        """Return (first input, column quad) of a vector."""
        return d.divide(v, self.per_row) * self.depth, d.remainder(v, self.per_row) * self.quads

    def base(self, block: Any) -> Any:
        """Return where a block begins, in vectors."""
        return block * (self.geometry.block_bytes // 16)

    def floats(self, base: Any, v: Any) -> list[Any]:
        """Return the values of a float vector: one or two float32x4."""
        words = d.let(self._k["w"][base + v])
        if self.fmt.dtype == "float32":
            return [d.let(d.as_bits(words, "float32x4"))]
        convert = d.from_half if self.fmt.dtype == "float16" else d.from_bfloat16
        values = [convert(h) for i in range(4) for h in d.halves(d.lane_of(words, i))]
        return [d.let(d.vector(values[:4])), d.let(d.vector(values[4:]))]

    def codes(self, base: Any, v: Any) -> tuple[list[Any], Any]:
        """Return (`depth` float32x4 codes of four columns, the group) of an integer vector."""
        fmt, g = self.fmt, self.geometry
        group = d.let(d.divide(v, self.per_group))
        inside = d.let(d.remainder(v, self.per_group))
        at = d.let(base + d.divide(self._at(group, 0, g.code_bytes), 16))
        low = d.let(self._k["w"][at + inside])
        bits, count = fmt.plane_bits[0], 8 // fmt.plane_bits[0]
        high, high_bits = None, 0
        if len(fmt.plane_bits) > 1:
            high_bits = fmt.plane_bits[1]
            runs = (8 // high_bits) // count  # runs of the low plane that share one of the high plane
            run, quad = d.divide(inside, 8), d.remainder(inside, 8)
            first = BLOCK * fmt.group_size * bits // 128
            words = self._k["w"][at + first + d.divide(run, runs) * 8 + quad]
            by = d.cast(d.remainder(run, runs) * (high_bits * count), "uint32")
            high = d.let(d.shift_by(words, by))
        found = []
        for p in range(count):
            for b in range(4):
                code = d.mask(d.shift(low, 8 * b + bits * p, 4), bits, 4)
                if high is not None:
                    top = d.mask(d.shift(high, 8 * b + high_bits * p, 4), high_bits, 4)
                    code = d.either(code, d.shift_left(top, bits, 4))
                found.append(d.cast(code, "float32x4"))
        return found, group

    def scales(self, base: Any, group: Any, quad: Any) -> Any:
        """Return the fp32 scales of a group for four columns."""
        g = self.geometry
        at = self._at(group, g.code_bytes, g.scale_bytes)
        return d.let(self._four(base, at, quad, self.fmt.scale_dtype, group, minimum=False))

    def offsets(self, base: Any, group: Any, quad: Any, scale: Any) -> Any:
        """Return what is added to scale * code, as a float32x4: the minimum, or -scale * zero point."""
        g, fmt = self.geometry, self.fmt
        if fmt.zero in ("none", "constant"):
            point = 128.0 if fmt.bits == 8 else float(fmt.zero_point)  # signed codes are stored + 128
            return d.let(scale * d.f32(-point, 4))
        at = self._at(group, g.code_bytes + g.scale_bytes, g.zero_bytes)
        if fmt.zero == "integer":
            points = self._bytes(base, at, quad, signed=False)
            return d.let(scale * points * d.f32(-1.0, 4))
        kind = "uint8" if fmt.block_size else fmt.scale_dtype
        return d.let(self._four(base, at, quad, kind, group, minimum=True))

    def _at(self, group: Any, before: int, size: int) -> Any:
        g = self.geometry
        if g.per_block == 1:
            return group * g.group_bytes + before
        block, inside = d.divide(group, g.per_block), d.remainder(group, g.per_block)
        return block * (g.per_block * g.group_bytes) + (g.per_block * before) + inside * size

    def _four(self, base: Any, at: Any, quad: Any, kind: str, group: Any, minimum: bool) -> Any:
        g = self.geometry
        if kind in ("int8", "uint8"):
            before = g.per_block * (g.code_bytes + g.scale_bytes + g.zero_bytes)
            before += g.factor_bytes if minimum else 0
            factor = d.divide(group, g.per_block) * (g.per_block * g.group_bytes) + before
            return self._bytes(base, at, quad, kind == "int8") * self._halves(base, factor, quad, d.from_half)
        if kind == "float32":
            return d.as_bits(self._k["w"][base + d.divide(at, 16) + quad], "float32x4")
        return self._halves(base, at, quad, d.from_half if kind == "float16" else d.from_bfloat16)

    def _halves(self, base: Any, at: Any, quad: Any, convert: Any) -> Any:
        words = d.let(self._k["w2"][base * 2 + d.divide(at, 8) + quad])
        return d.vector([convert(h) for i in range(2) for h in d.halves(d.lane_of(words, i))])

    def _bytes(self, base: Any, at: Any, quad: Any, signed: bool) -> Any:
        word = d.let(self._k["w1"][base * 4 + d.divide(at, 4) + quad])
        return d.vector([d.byte_of(word, i, signed) for i in range(4)])
