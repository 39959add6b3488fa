"""Vector arithmetic that kernels share, as expressions over float32 vectors of any lane count.

Each function takes and returns TIR expressions (a scalar is one lane) and holds its intermediate values
in registers, so call it where statements may stand. Only IEEE operations are used
and no intrinsics: every LLVM CPU can run it, and a missing FMA costs no accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import tir
from .tir import T

# exp(r) for |r| <= ln(2)/2, minimax in relative error (9.2e-8) with exp(0) = 1, lowest power first.
_EXP_COEFFICIENTS = (1.0, 0.999999706313, 0.499991478407, 0.166676381286, 0.0418981596589, 0.00829027202907)
_LOG2_E = 1.4426950408889634
_LN2_HIGH = 0.693359375  # ln(2) in two parts: n * high is exact in fp32
_LN2_LOW = -2.12194440e-4
_EXP_LOW = -86.98  # below it the result is zero: exp(-86.98) = 1.7e-38, next to the last normal numbers
_EXP_HIGH = 89.0  # above ln(FLT_MAX) = 88.72: the result is inf
# tanh(x) = x * P(x^2) / Q(x^2) for |x| <= 7.9053; beyond it tanh is 1 in fp32 (Eigen's rational form).
_TANH_LIMIT = 7.90531110763549805
_TANH_P = (4.89352455891786e-03, 6.37261928875436e-04, 1.48572235717979e-05, 5.12229709037114e-08,
           -8.60467152213735e-11, 2.00018790482477e-13, -2.76076847742355e-16)  # fmt: skip
_TANH_Q = (4.89352518554385e-03, 2.26843463243900e-03, 1.18534705686654e-04, 1.19825839466702e-06)
_GELU_LINEAR, _GELU_CUBIC = 1.5957691216057308, 0.07135481282553254  # 2 sqrt(2 / pi), and 0.044715 times it


def exp(x: Any) -> Any:
    """Return e**x to 1e-6, exp(0) = 1 exactly; x < -86.98 gives 0, x > 88.73 inf, NaN stays NaN."""
    lanes = tir.lanes_of(x)
    x = hold(x)
    low, high = tir.f32(_EXP_LOW, lanes), tir.f32(_EXP_HIGH, lanes)
    below = hold(T.Select(high < x, high, x))  # NaN passes: a false comparison keeps x
    bounded = T.Select(low > below, low, below)
    safe = T.Select(below > low, below, low)  # NaN becomes `low`: NaN to int is undefined
    # n = floor(x * log2(e) + 1/2), by truncating a positive number: one instruction on every CPU.
    n = hold(tir.cast(safe * tir.f32(_LOG2_E, lanes) + tir.f32(128.5, lanes), "int32") - tir.i32(128, lanes))
    n_float = hold(tir.cast(n, "float32"))
    r = hold((bounded - n_float * tir.f32(_LN2_HIGH, lanes)) - n_float * tir.f32(_LN2_LOW, lanes))
    # Coefficients are doubled and the exponent lowered by one, so that 2**128 overflows and not before.
    p = tir.f32(2.0 * _EXP_COEFFICIENTS[-1], lanes)
    for coefficient in reversed(_EXP_COEFFICIENTS[:-1]):
        p = p * r + tir.f32(2.0 * coefficient, lanes)
    power = T.shift_left(T.max(n + tir.i32(126, lanes), tir.i32(0, lanes)), tir.i32(23, lanes))
    result = p * tir.bits(power, vector_type("float32", lanes))
    return hold(T.Select(x < low, tir.f32(0.0, lanes), result))


def sigmoid(x: Any) -> Any:
    """Return 1 / (1 + e**-x)."""
    lanes = tir.lanes_of(x)
    one = tir.f32(1.0, lanes)
    return hold(one / (one + exp(tir.f32(0.0, lanes) - x)))


def silu(x: Any) -> Any:
    """Return x / (1 + e**-x); -inf gives NaN, as in PyTorch."""
    lanes = tir.lanes_of(x)
    x = hold(x)
    return hold(x / (tir.f32(1.0, lanes) + exp(tir.f32(0.0, lanes) - x)))


def gelu(x: Any) -> Any:
    """Return GELU in its tanh form, x * (1 + tanh(u)) / 2 = x / (1 + e**-2u); -inf gives NaN."""
    lanes = tir.lanes_of(x)
    x = hold(x)
    slope = x * x * tir.f32(-_GELU_CUBIC, lanes) - tir.f32(_GELU_LINEAR, lanes)
    return hold(x / (tir.f32(1.0, lanes) + exp(x * slope)))


def tanh(x: Any) -> Any:
    """Return tanh(x) within 1e-6 relative; NaN stays NaN."""
    lanes = tir.lanes_of(x)
    limit, low = tir.f32(_TANH_LIMIT, lanes), tir.f32(-_TANH_LIMIT, lanes)
    value = hold(x)
    value = hold(T.Select(value > limit, limit, value))
    value = hold(T.Select(low > value, low, value))
    square = hold(value * value)
    p, q = tir.f32(_TANH_P[-1], lanes), tir.f32(_TANH_Q[-1], lanes)
    for coefficient in reversed(_TANH_P[:-1]):
        p = p * square + tir.f32(coefficient, lanes)
    for coefficient in reversed(_TANH_Q[:-1]):
        q = q * square + tir.f32(coefficient, lanes)
    return hold(value * p / q)


def hold(value: Any) -> Any:
    """Compute a value once, here: TVM's passes inline chains of `tir.let` into trees, but not a register."""
    dtype = str(value.dtype if hasattr(value, "dtype") else value.ty.dtype)
    register = tir.Register(dtype.split("x")[0], tir.lanes_of(value))
    register.set(value)
    return register.get()


def vector_type(dtype: str, lanes: int) -> str:
    """Return the dtype string of `lanes` elements."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def fold(value: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Reduce the lanes to a scalar by halving: log2(lanes) steps, in the same order on every machine."""
    lanes = tir.lanes_of(value)
    while lanes > 1:
        lanes //= 2
        value = hold(value)
        low, high = (T.Shuffle([value], [T.int32(start + i) for i in range(lanes)]) for start in (0, lanes))
        value = combine(low, high)
    return hold(value)


def pieces(count: int, lanes: int) -> list[tuple[int, int]]:
    """Cut `count` elements into (offset, width) of powers of two up to `lanes`: 13 is 8, 4 and 1."""
    found, offset = [], 0
    while offset < count:
        width = min(lanes, 1 << ((count - offset).bit_length() - 1))
        found.append((offset, width))
        offset += width
    return found
