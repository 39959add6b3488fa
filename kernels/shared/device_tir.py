"""Emit TIR for devices with work-groups (OpenCL, Metal, WebGPU): one function a kernel.

Kernels use 32-bit types and vectors of four alone, so that one schedule gives source in each language; 16-bit
values lie in 32-bit words. A wide buffer ("*uint32x4") is indexed in vectors of 16 bytes.
This module imports tvm; import it only from a form's lowering.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tvm.script.ir_builder.tirx as T  # pyright: ignore[reportMissingImports]  made at run time
from tvm import tirx
from tvm.script.ir_builder import IRBuilder

Expr = Any
Buffer = Any
_UNBOUNDED = 1 << 30
GRID = ("grid_x", "grid_y")  # WebGPU has no third


class DeviceKernel:
    """One kernel under construction: `k = DeviceKernel(name, args, lanes)`, emit, then `k.finish()`.

    `args` are (name, type) in calling order: "int32", "float32" or "uint32", or "*type" for a buffer.
    Buffers are different memory unless `in_place`.
    `k.group` are the work-group's two numbers, `k.lane` is the work-item in it, `k["x"]` an argument.
    """

    def __init__(
        self, name: str, args: Sequence[tuple[str, str]], lanes: int, in_place: bool = False
    ) -> None:
        self._stack = contextlib.ExitStack()
        self._builder = self._stack.enter_context(IRBuilder())
        self._stack.enter_context(T.prim_func(s_tir=True))
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": not in_place, "lanes": lanes})
        self._args = {n: _argument(n, kind) for n, kind in args}
        sizes = [T.arg(n, tirx.Var(n, "int32")) for n in GRID]
        threads = (("blockIdx.x", sizes[0]), ("blockIdx.y", sizes[1]))
        *group, self.lane = (
            self._stack.enter_context(T.launch_thread(tag, extent))
            for tag, extent in (*threads, ("threadIdx.x", lanes))
        )
        self.group: tuple[Expr, ...] = tuple(group)
        self.lanes = lanes

    def __getitem__(self, name: str) -> Any:
        return self._args[name]

    def finish(self) -> Any:
        """Close the function and return the PrimFunc."""
        self._stack.close()
        return self._builder.get()


def _argument(name: str, kind: str) -> Any:
    if kind[0] == "*":
        return T.arg(name, T.Buffer((_UNBOUNDED,), kind[1:]))
    return T.arg(name, tirx.Var(name, kind))


class Register:
    """One variable of a work-item: `set` stores, `get` loads."""

    def __init__(self, dtype: str, value: Expr | None = None) -> None:
        self._cell = T.alloc_buffer((1,), dtype, scope="local")
        if value is not None:
            self.set(value)

    def get(self) -> Expr:
        """Return the value."""
        return self._cell[0]

    def set(self, value: Expr) -> None:
        """Emit a store."""
        T.buffer_store(self._cell, value, [0])

    def add(self, value: Expr) -> None:
        """Emit an addition."""
        self.set(self.get() + value)


def local_memory(dtype: str, size: int) -> Buffer:
    """Allocate memory of the work-group."""
    return T.alloc_buffer((size,), dtype, scope="shared")


def barrier() -> None:
    """Emit a barrier of the work-group."""
    T.evaluate(T.tvm_storage_sync("shared"))


@contextlib.contextmanager
def loop(stop: Expr) -> Iterator[Expr]:
    """Emit a serial loop over [0, stop)."""
    with T.serial(0, stop) as i:
        yield i


@contextlib.contextmanager
def strided(k: DeviceKernel, count: int) -> Iterator[Expr]:
    """Emit a loop of the lanes, side by side, over [0, count)."""
    with T.serial(0, -(-count // k.lanes)) as turn:
        i = T.bind(turn * k.lanes + k.lane)
        if count % k.lanes == 0:
            yield i
        else:
            with when(i < count):
                yield i


@contextlib.contextmanager
def when(condition: Expr) -> Iterator[None]:
    """Emit the body under a condition."""
    with T.If(condition), T.Then():
        yield


def let(value: Expr) -> Expr:
    """Bind a value to a variable: evaluated once, here."""
    return T.bind(value)


def store(buffer: Buffer, index: Expr, value: Expr) -> None:
    """Store one element."""
    T.buffer_store(buffer, value, [index])


def load4(buffer: Buffer, index: Expr) -> Expr:
    """Load four consecutive elements of a scalar buffer."""
    return buffer[T.ramp(index, 1, 4)]


def f32(value: float, lanes: int = 1) -> Expr:
    """Return an fp32 constant."""
    return splat(T.float32(value), lanes)


def u32(value: int, lanes: int = 1) -> Expr:
    """Return a uint32 constant."""
    return splat(T.uint32(value), lanes)


def i32(value: int) -> Expr:
    """Return an int32 constant."""
    return T.int32(value)


def splat(value: Expr, lanes: int = 4) -> Expr:
    """Broadcast a scalar expression."""
    return T.broadcast(value, lanes) if lanes > 1 else value


def cast(value: Expr, dtype: str) -> Expr:
    """Convert a scalar or vector to the type `dtype` (lanes included in the name)."""
    return T.Cast(dtype, value)


def as_bits(value: Expr, dtype: str) -> Expr:
    """Take the bits as another type of the same size."""
    return T.reinterpret(dtype, value)


def lane_of(vector: Expr, i: int) -> Expr:
    """Return component `i` of a vector."""
    return T.Shuffle([vector], [i])


def vector(values: Sequence[Expr]) -> Expr:
    """Make a vector of scalars."""
    return T.Shuffle(list(values), list(range(len(values))))


def choose(condition: Expr, a: Expr, b: Expr) -> Expr:
    """Return a or b; both are computed."""
    return T.Select(condition, a, b)


def guarded(condition: Expr, value: Expr, other: Expr) -> Expr:
    """Return `value` where the condition holds, else `other`, without computing (loading) `value`."""
    return T.if_then_else(condition, value, other)


def divide(value: Expr, by: int) -> Expr:
    """Divide a value that is not negative."""
    if by & (by - 1) == 0:
        return T.shift_right(value, T.int32(by.bit_length() - 1)) if by > 1 else value
    return T.truncdiv(value, T.int32(by))


def remainder(value: Expr, by: int) -> Expr:
    """Return the remainder of a value that is not negative."""
    if by & (by - 1) == 0:
        return T.bitwise_and(value, T.int32(by - 1))
    return T.truncmod(value, T.int32(by))


def truncated_division(a: Expr, b: Expr) -> Expr:
    """Divide integers that are not negative."""
    return T.truncdiv(a, b)


def sum_of(four: Expr) -> Expr:
    """Return the sum of a float32x4's components."""
    a, b, c, e = (lane_of(four, i) for i in range(4))
    return (a + b) + (c + e)


def shift(value: Expr, bits: int, lanes: int = 1) -> Expr:
    """Shift words right by a constant."""
    return T.shift_right(value, u32(bits, lanes)) if bits else value


def mask(value: Expr, bits: int, lanes: int = 1) -> Expr:
    """Keep the lowest `bits` of words."""
    return T.bitwise_and(value, u32((1 << bits) - 1, lanes))


def i64(value: int) -> Expr:
    """Return an int64 constant."""
    return T.int64(value)


def shift64(value: Expr, bits: Any) -> Expr:
    """Shift an int64 right."""
    return T.shift_right(value, T.int64(bits) if isinstance(bits, int) else bits)


def mask64(value: Expr, bits: int) -> Expr:
    """Keep the lowest `bits` of an int64."""
    return T.bitwise_and(value, T.int64((1 << bits) - 1))


def invert(word: Expr) -> Expr:
    """Return the word with every bit turned."""
    return T.bitwise_xor(word, T.uint32(0xFFFFFFFF))


def one_of(a: Expr, b: Expr) -> Expr:
    """Return whether one holds."""
    return T.Or(a, b)


def shift_by(words: Expr, bits: Expr) -> Expr:
    """Shift four words right by a uint32 expression."""
    return T.shift_right(words, splat(bits))


def shift_left(value: Expr, bits: int, lanes: int = 1) -> Expr:
    """Shift words left by a constant."""
    return T.shift_left(value, u32(bits, lanes))


def either(a: Expr, b: Expr) -> Expr:
    """Return the bits that are set in a or b."""
    return T.bitwise_or(a, b)


def byte_of(word: Expr, i: int, signed: bool = False) -> Expr:
    """Return byte `i` of a word as fp32."""
    if not signed:
        return T.Cast("float32", mask(shift(word, 8 * i), 8))
    top = as_bits(shift_left(word, 24 - 8 * i), "int32") if i < 3 else as_bits(word, "int32")
    return T.Cast("float32", T.shift_right(top, T.int32(24)))


def from_half(word: Expr) -> Expr:
    """Return the fp16 value in the low half of a word; the back end gives `ef_half` in each language."""
    return T.call_pure_extern("float32", "ef_half", word)


def to_half(value: Expr) -> Expr:
    """Return fp32 rounded to nearest even fp16, in the low half of a word."""
    return T.call_pure_extern("uint32", "ef_to_half", value)


def from_bfloat16(word: Expr) -> Expr:
    """Return the bf16 value in the low half of a word."""
    return as_bits(T.shift_left(word, T.uint32(16)), "float32")


def to_bfloat16(value: Expr) -> Expr:
    """Return fp32 rounded to nearest even bf16, in the low half of a word; a NaN stays one."""
    raw = let(as_bits(value, "uint32"))
    rounded = shift(raw + T.uint32(0x7FFF) + mask(shift(raw, 16), 1), 16)
    quiet = T.bitwise_or(shift(raw, 16), T.uint32(0x40))
    return choose(T.bitwise_and(raw, T.uint32(0x7FFFFFFF)) > T.uint32(0x7F800000), quiet, rounded)


def halves(word: Expr) -> tuple[Expr, Expr]:
    """Return the low and the high half of a word, each in the low half of one."""
    return mask(word, 16), shift(word, 16)


def fold(k: DeviceKernel, memory: Buffer, combine: Callable[[Expr, Expr], Expr], keep: int = 1) -> None:
    """Combine `memory`[lanes] pairwise into its first `keep` elements (i into i % keep); ends in a barrier.

    Both the lanes and `keep` are powers of two.
    """
    barrier()
    half = k.lanes // 2
    while half >= keep:
        with when(k.lane < half):
            store(memory, k.lane, combine(memory[k.lane], memory[k.lane + half]))
        barrier()
        half //= 2


def add(a: Expr, b: Expr) -> Expr:
    """Return a + b."""
    return a + b


def maximum(a: Expr, b: Expr) -> Expr:
    """Return the larger, lane by lane."""
    return T.max(a, b)


def minimum(a: Expr, b: Expr) -> Expr:
    """Return the smaller, lane by lane."""
    return T.min(a, b)


def exp(value: Expr) -> Expr:
    """Return e to the value."""
    return T.exp(value)


def tanh(value: Expr) -> Expr:
    """Return the hyperbolic tangent."""
    return T.tanh(value)


def sqrt(value: Expr) -> Expr:
    """Return the square root."""
    return T.sqrt(value)


def both(a: Expr, b: Expr) -> Expr:
    """Return whether both hold."""
    return T.And(a, b)


def round_even(value: Expr) -> Expr:
    """Round |value| < 2^22 to the nearest even integer: what is added leaves no room for a fraction."""
    return (value + f32(12582912.0)) - f32(12582912.0)
