"""Vector fragments of attention: 2**x, transposes, and accumulators that stay in registers."""

from __future__ import annotations

from typing import Any

from ..shared import tir
from ..shared.tir import T

# 2**f for |f| <= 1/2, minimax in relative error (7.5e-8), lowest power first.
_EXP2 = (1.0000000716546849, 0.6931469670647613, 0.240221197238401, 0.05550713273496898, 0.009675541334449414,
         0.0013276471992851953)  # fmt: skip
# The same to 7.5e-5.
_EXP2_SHORT = (0.9999280727914858, 0.6932609870103537, 0.24261113509319007, 0.055171666818512974)
# Both for 0 <= f < 1 (the same polynomials, moved).
_EXP2_UP = (0.9999999250635263, 0.6931530732001749, 0.24015361704431892, 0.05582631805346651,
            0.00898934009029039, 0.0018775766752757786)  # fmt: skip
_EXP2_SHORT_UP = (0.9999252213659069, 0.6958335220677827, 0.2260671784213145, 0.07802451947347072)
_ROUND = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453

NEGATIVE_INFINITY = float("-inf")


def minus_infinity(lanes: int = 1) -> Any:
    """Return fp32 -inf, broadcast."""
    return tir.splat(tir.bits(T.uint32(0xFF800000), "float32"), lanes)


def exp2(x: Any, lanes: int, isa: Any = None, short: bool = False) -> Any:
    """Return 2**x for x <= 0 within 2e-6: -inf gives exactly 0, NaN stays NaN, x < -126.5 gives at most 2**x.

    `short` is within 8e-5, far below bf16's rounding. Whole vectors of an `isa` whose file has `fraction`
    and `scale` take those. Intermediates stand in registers: a shared subexpression of TIR would be copied.
    """
    value = tir.Register("float32", lanes)
    value.set(x)
    if isa is not None and lanes == isa.lanes and hasattr(isa.emit, "scale"):
        part = tir.Register("float32", lanes)
        part.set(isa.emit.fraction(value.get()))
        p = _polynomial(part, _EXP2_SHORT_UP if short else _EXP2_UP, lanes)
        return isa.emit.scale(p, value.get())
    rounded, low = tir.Register("float32", lanes), tir.f32(-127.0, lanes)
    value.set(T.Select(low > value.get(), low, value.get()))
    rounded.set(value.get() + tir.f32(_ROUND, lanes))
    value.set(value.get() - (rounded.get() - tir.f32(_ROUND, lanes)))
    p = _polynomial(value, _EXP2_SHORT if short else _EXP2, lanes)
    word = "int32" if lanes == 1 else f"int32x{lanes}"
    exponent = T.shift_left(tir.bits(rounded.get(), word) + tir.i32(127, lanes), tir.i32(23, lanes))
    return p * tir.bits(exponent, "float32" if lanes == 1 else f"float32x{lanes}")


def _polynomial(x: Any, coefficients: tuple[float, ...], lanes: int) -> Any:
    p = tir.f32(coefficients[-1], lanes)
    for coefficient in reversed(coefficients[:-1]):
        p = p * x.get() + tir.f32(coefficient, lanes)
    return p


class Registers:
    """A table of vectors, each in a variable of its own, so that it can live in a register."""

    def __init__(self, count: int, lanes: int) -> None:
        self._slots = [tir.Register("float32", lanes) for _ in range(count)]

    def __getitem__(self, i: int) -> Any:
        return self._slots[i].get()

    def __setitem__(self, i: int, value: Any) -> None:
        self._slots[i].set(value)

    def add_product(self, i: int, a: Any, b: Any) -> None:
        """slot i += a * b (one fused multiply-add where the CPU has it)."""
        self[i] = self[i] + a * b


def transpose(rows: Registers, lanes: int) -> Registers:
    """Return the transpose of `lanes` vectors of `lanes`: 4 x 4 within 128 bits, then whole quarters."""
    quarters = lanes // 4
    out = Registers(lanes, lanes)
    for g in range(quarters):
        a, b, c, d = (rows[4 * g + i] for i in range(4))
        half = Registers(4, lanes)
        for i, (x, y) in enumerate(((a, b), (c, d))):
            half[2 * i] = _by_quarter(x, y, (0, 4, 1, 5), lanes)
            half[2 * i + 1] = _by_quarter(x, y, (2, 6, 3, 7), lanes)
        for k in range(4):
            pattern = (0, 1, 4, 5) if k % 2 == 0 else (2, 3, 6, 7)
            out[4 * g + k] = _by_quarter(half[k // 2], half[2 + k // 2], pattern, lanes)
    # Now out[4g + k] quarter q holds column 4q + k of rows 4g..4g+3: swap g and q.
    step = 1
    while step < quarters:
        for g in range(quarters):
            if g & step:
                continue
            for k in range(4):
                low, high = out[4 * g + k], out[4 * (g + step) + k]
                first, second = [], []
                for q in range(quarters):
                    first.append(q if not q & step else quarters + q - step)
                    second.append(q + step if not q & step else quarters + q)
                swapped = Registers(2, lanes)
                swapped[0], swapped[1] = _quarters(low, high, first), _quarters(low, high, second)
                out[4 * g + k], out[4 * (g + step) + k] = swapped[0], swapped[1]
        step *= 2
    # Row 4q + k of the result stands in slot 4q + k.
    return out


def sums_of_four(vectors: Registers, first: int, stride: int, lanes: int) -> Any:
    """Return [sum(v0), sum(v1), sum(v2), sum(v3)] of four vectors, slots first, first + stride, ..."""
    v = [vectors[first + i * stride] for i in range(4)]
    half = Registers(2, lanes)
    for i in range(2):
        a, b = v[2 * i], v[2 * i + 1]
        half[i] = _by_quarter(a, b, (0, 2, 4, 6), lanes) + _by_quarter(a, b, (1, 3, 5, 7), lanes)
    a, b = half[0], half[1]
    whole = _by_quarter(a, b, (0, 2, 4, 6), lanes) + _by_quarter(a, b, (1, 3, 5, 7), lanes)
    width = lanes
    while width > 4:
        held = Registers(1, width)
        held[0] = whole
        width //= 2
        low, high = ([T.int32(start + i) for i in range(width)] for start in (0, width))
        whole = T.Shuffle([held[0]], low) + T.Shuffle([held[0]], high)
    return whole


def _by_quarter(a: Any, b: Any, pattern: tuple[int, ...], lanes: int) -> Any:
    """Apply a 4-wide two-operand shuffle within every 128 bits (0-3 of a, 4-7 of b)."""
    indices = []
    for base in range(0, lanes, 4):
        indices += [base + p if p < 4 else lanes + base + p - 4 for p in pattern]
    return T.Shuffle([a, b], [T.int32(i) for i in indices])


def _quarters(a: Any, b: Any, pattern: list[int]) -> Any:
    """Gather 128-bit pieces: piece p of the concatenation of a and b."""
    return T.Shuffle([a, b], [T.int32(4 * p + i) for p in pattern for i in range(4)])
