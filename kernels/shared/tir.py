"""Emit TIR from ordinary Python: kernels are functions that call these, so a generator can compose them.

Every kernel argument is an int64 scalar: a size, or the address of a buffer. Addresses carry the
alignment that the kernel may rely on (the element size unless stated), so a misaligned view is right.
This module imports tvm; import it only from a form's lowering.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tvm
import tvm.script.ir_builder.tirx as T  # pyright: ignore[reportMissingImports]  made at run time
from tvm import tirx
from tvm.ir import Call, Op, PointerType, PrimType
from tvm.script.ir_builder import IRBuilder

_UNBOUNDED = 1 << 40
_BYTES = {
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
}

# A cell that LLVM cannot remove, aligned as the widest vector. So it aligns the stack frame, and each vector
# that it keeps there lies in one cache line; without, it notices too late that it will need to.
_ALIGNED_STACK = """
define linkonce_odr i32 @ef_align_stack() alwaysinline {
  %cell = alloca i64, align 64
  call void asm sideeffect "", "r"(ptr %cell)
  ret i32 0
}"""

Expr = Any
Buffer = Any


class Kernel:
    """One function under construction: `k = Kernel(name, args)`, emit statements, then `k.finish()`.

    `args` are (name, type) in calling order; a type is a scalar's dtype ("int64", "float32") or "*dtype"
    for the address of a buffer (an int64 at run time). `k["x"]` is the scalar or the unbounded 1-D buffer.
    """

    def __init__(self, name: str, args: Sequence[tuple[str, str]]) -> None:
        self._stack = contextlib.ExitStack()
        self._builder = self._stack.enter_context(IRBuilder())
        self._stack.enter_context(T.prim_func(s_tir=True))
        T.func_name(name)
        T.func_attr({"global_symbol": name})
        scalars = {n: T.arg(n, tirx.Var(n, "int64" if kind[0] == "*" else kind)) for n, kind in args}
        self._args = {
            n: buffer_at(scalars[n], kind[1:]) if kind[0] == "*" else scalars[n] for n, kind in args
        }

    def __getitem__(self, name: str) -> Any:
        return self._args[name]

    def finish(self) -> Any:
        """Close the function and return the PrimFunc."""
        self._stack.close()
        return self._builder.get()


def buffer_at(address: Expr, dtype: str, align: int | None = None) -> Buffer:
    """Return the memory at an int64 address as an unbounded 1-D buffer (`align` in bytes)."""
    pointer = T.bind(
        Call(Op.get("tirx.reinterpret"), [address], ret_ty=PointerType(PrimType(dtype), "global"))
    )
    return T.decl_buffer((_UNBOUNDED,), dtype, data=pointer, align=align or _BYTES[dtype])


def local(dtype: str, size: int) -> Buffer:
    """Allocate a small array. Accumulators are `Register`s: TVM splits vector accesses to plain arrays."""
    return T.alloc_buffer((size,), dtype, scope="global")


class Register:
    """One vector (or scalar) variable: `set` stores, `get` loads; LLVM keeps it in a register."""

    def __init__(self, dtype: str, lanes: int) -> None:
        self._cell = T.alloc_buffer((1,), f"{dtype}x{lanes}" if lanes > 1 else dtype, scope="global")

    def get(self) -> Expr:
        """Return the value."""
        return self._cell[0]

    def set(self, value: Expr) -> None:
        """Emit a store."""
        T.buffer_store(self._cell, value, [0])


@contextlib.contextmanager
def loop(stop: Expr, start: Expr = 0) -> Iterator[Expr]:
    """Emit a serial loop over [start, stop); it counts from 0, since TVM's passes mishandle other starts."""
    if isinstance(start, int) and start == 0:
        with T.serial(T.int64(0), _i64(stop)) as i:
            yield i
        return
    first = let(_i64(start))
    with T.serial(T.int64(0), let(_i64(stop) - first)) as i:
        yield let(first + i)


@contextlib.contextmanager
def span(start: Expr, stop: Expr) -> Iterator[Expr]:
    """Emit a serial loop over [start, stop) that counts from 0: TVM's passes mishandle others."""
    with loop(let(stop - start)) as i:
        yield let(start + i)


@contextlib.contextmanager
def parallel(stop: Expr) -> Iterator[Expr]:
    """Emit a loop over [0, stop) split over the threads in contiguous ranges."""
    with T.parallel(T.int64(0), _i64(stop)) as i, import_llvm(_ALIGNED_STACK):
        T.evaluate(T.call_extern("int32", "ef_align_stack"))
        yield i


@contextlib.contextmanager
def when(condition: Expr) -> Iterator[None]:
    """Emit the body under a condition."""
    with T.If(condition), T.Then():
        yield


@contextlib.contextmanager
def import_llvm(text: str) -> Iterator[None]:
    """Link LLVM IR helpers (alwaysinline functions) into the code of the body."""
    with T.attr(T.int32(0), "pragma_import_llvm", text):
        yield


def let(value: Expr) -> Expr:
    """Bind a value to a variable: evaluated once, here."""
    return T.bind(value)


def load(buffer: Buffer, offset: Expr, lanes: int = 1) -> Expr:
    """Load `lanes` consecutive elements."""
    return buffer[T.ramp(_i64(offset), T.int64(1), lanes)] if lanes > 1 else buffer[_i64(offset)]


def store(buffer: Buffer, offset: Expr, value: Expr) -> None:
    """Store a scalar or vector at `offset`."""
    lanes = lanes_of(value)
    T.buffer_store(buffer, value, [T.ramp(_i64(offset), T.int64(1), lanes) if lanes > 1 else _i64(offset)])


def lanes_of(value: Expr) -> int:
    """Return the number of lanes of an expression (1 for a scalar)."""
    dtype = str(value.dtype) if hasattr(value, "dtype") else str(value.ty.dtype)
    return int(dtype.rsplit("x", 1)[1]) if "x" in dtype else 1


def splat(value: Expr, lanes: int) -> Expr:
    """Broadcast a scalar expression."""
    return T.broadcast(value, lanes) if lanes > 1 else value


def f32(value: float, lanes: int = 1) -> Expr:
    """Return an fp32 constant, broadcast over `lanes`."""
    return splat(T.float32(value), lanes)


def i32(value: int, lanes: int = 1) -> Expr:
    """Return an int32 constant, broadcast over `lanes`."""
    return splat(T.int32(value), lanes)


def cast(value: Expr, dtype: str) -> Expr:
    """Convert, keeping the lanes; `dtype` names the scalar type."""
    lanes = lanes_of(value)
    return T.Cast(f"{dtype}x{lanes}" if lanes > 1 else dtype, value)


def bits(value: Expr, dtype: str) -> Expr:
    """Reinterpret the bits as `dtype` (lanes included in the name)."""
    return T.reinterpret(dtype, value)


def to_f32(buffer: Buffer, offset: Expr, lanes: int) -> Expr:
    """Load fp32, fp16 or bf16 elements as fp32."""
    value = load(buffer, offset, lanes)
    dtype = str(buffer.dtype)
    if dtype == "float32":
        return value
    if dtype == "bfloat16":  # widening is a shift: exact, and needs no legalisation
        raw = bits(value, f"uint16x{lanes}" if lanes > 1 else "uint16")
        wide = T.shift_left(cast(raw, "uint32"), splat(T.uint32(16), lanes))
        return bits(wide, f"float32x{lanes}" if lanes > 1 else "float32")
    return cast(value, "float32")


def from_f32(buffer: Buffer, offset: Expr, value: Expr) -> None:
    """Store fp32 values into an fp32, fp16 or bf16 buffer (round to nearest even)."""
    dtype = str(buffer.dtype)
    if dtype == "bfloat16":
        lanes = lanes_of(value)
        store(buffer, offset, bits(bf16_bits(value), f"bfloat16x{lanes}" if lanes > 1 else "bfloat16"))
    else:
        store(buffer, offset, value if dtype == "float32" else cast(value, dtype))


def bf16_bits(value: Expr) -> Expr:
    """Round fp32 to nearest even bf16, as uint16."""
    lanes = lanes_of(value)
    raw = bits(value, f"uint32x{lanes}" if lanes > 1 else "uint32")
    u = lambda c: splat(T.uint32(c), lanes)  # noqa: E731
    odd = T.bitwise_and(T.shift_right(raw, u(16)), u(1))
    rounded = T.shift_right(raw + u(0x7FFF) + odd, u(16))
    quiet = T.bitwise_or(T.shift_right(raw, u(16)), u(0x40))  # a NaN must not round to Inf
    chosen = T.Select(T.bitwise_and(raw, u(0x7FFFFFFF)) > u(0x7F800000), quiet, rounded)
    return cast(chosen, "uint16")


def intrinsic(dtype: str, name: str, *args: Expr) -> Expr:
    """Call a pure LLVM intrinsic."""
    return T.call_llvm_pure_intrin(dtype, name, *args)


def prefetch(buffer: Buffer, offset: Expr, locality: int = 3) -> None:
    """Prefetch the line of an element for reading (locality 3: into L1)."""
    address = T.address_of(buffer[_i64(offset)])
    T.evaluate(
        T.call_llvm_intrin("void", "llvm.prefetch.p0", address, T.int32(0), T.int32(locality), T.int32(1))
    )


def reduce_max(value: Expr) -> Expr:
    """Return the largest lane (LLVM's own reduction tests every lane for NaN)."""
    return _fold(value, T.max)


def reduce_add(value: Expr) -> Expr:
    """Return the sum of the lanes, added in halves."""
    return _fold(value, lambda a, b: a + b)


def reduce_together(values: Sequence[Expr], combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """Return one vector whose lane i is vector i's lanes combined: two shuffles and one operation a pair.

    At most as many vectors as they have lanes; the lanes of missing ones are combinations of zeros.
    """
    lanes, dtype = lanes_of(values[0]), _dtype(values[0])
    rows: list[Expr | None] = [*values, *[None] * (lanes - len(values))]
    zero = T.Cast(dtype, splat(T.int32(0), lanes))
    while len(rows) > 1:
        level: list[Expr | None] = []
        for a, b in zip(rows[::2], rows[1::2], strict=True):
            if a is None:
                level.append(None)
                continue
            cells = [Register(dtype.rsplit("x", 1)[0], lanes) for _ in range(2)]
            for cell, value in zip(cells, (a, zero if b is None else b), strict=True):
                cell.set(value)
            held = [cell.get() for cell in cells]
            even, odd = ([T.int32(i) for i in range(start, 2 * lanes, 2)] for start in range(2))
            level.append(combine(T.Shuffle(held, even), T.Shuffle(held, odd)))
        rows = level
    assert rows[0] is not None
    return rows[0]


def round_to_int(value: Expr) -> Expr:
    """Return fp32 rounded to the nearest even int32; of NaN and what does not fit, some number."""
    lanes = lanes_of(value)
    return intrinsic(f"int32x{lanes}" if lanes > 1 else "int32", "llvm.lrint", value)


def _fold(value: Expr, combine: Any) -> Expr:
    lanes = lanes_of(value)
    dtype = _dtype(value).rsplit("x", 1)[0]
    while lanes > 1:
        cell = Register(dtype, lanes)  # a value that is used twice has to be held: TVM inlines bound ones
        cell.set(value)
        lanes //= 2
        value = combine(_half(cell.get(), 0, lanes), _half(cell.get(), lanes, lanes))
    return value


def maximum(a: Expr, b: Expr) -> Expr:
    """Return the larger, lane by lane."""
    return T.max(a, b)


def _half(value: Expr, start: int, count: int) -> Expr:
    indices = [T.int32(start + i) for i in range(count)]
    return T.Shuffle([value], indices)


def _dtype(value: Expr) -> str:
    return str(value.dtype) if hasattr(value, "dtype") else str(value.ty.dtype)


def _i64(value: Expr) -> Expr:
    if isinstance(value, int):
        return T.int64(value)
    return value if _dtype(value) == "int64" else T.Cast("int64", value)


def module(functions: Sequence[Any]) -> Any:
    """Return PrimFuncs as one IRModule."""
    return tvm.IRModule({str(f.attrs["global_symbol"]): f for f in functions})
