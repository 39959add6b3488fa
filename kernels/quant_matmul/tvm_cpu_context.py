"""What the emitters of a product share: the problem, its memory, and how results leave the registers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..shared import tir
from ..shared.isa.table import Isa
from ..shared.math import gelu, silu, tanh
from ..shared.tir import T
from .packing import BLOCK, Geometry
from .sizes import is_integer, padded_k, uses_matrix, uses_pairs, uses_squares
from .spec import QuantMatmulSpec
from .tvm_cpu_rows import correction_kind
from .tvm_cpu_stream import Stream

# "one" is 1 at run time: a trip count times it is one that LLVM cannot know.
ARGUMENTS = (
    "m",
    "threads",
    "one",
    "x",
    "w",
    "bias",
    "residual",
    "y",
    "codes",
    "scales",
    "sums",
    "panel",
    "counter",
)


@dataclass
class Context:
    """What the emitters of one function share."""

    isa: Isa
    spec: QuantMatmulSpec
    kernel: Any
    rows: int
    vectors: int
    # Of a matrix unit's products: takes (row, first column, 32 finished values as two vectors) instead of y.
    sink: Callable[[Any, Any, list[Any]], None] | None = None
    # Where the product is some columns of a wider y: the columns of that, and before these.
    y_columns: int = 0
    y_before: int = 0

    def y_at(self, row: Any, column: Any) -> Any:
        """Where a result stands in y."""
        return row * (self.y_columns or self.spec.n_out) + column + self.y_before

    @property
    def geometry(self) -> Geometry:
        """Sizes of the weight's layout."""
        return Geometry(self.spec.weight, self.spec.k)

    @property
    def integer(self) -> bool:
        """Whether the products are integer."""
        return is_integer(self.spec)

    @property
    def matrix(self) -> bool:
        """Whether the products are a matrix unit's."""
        return uses_matrix(self.spec)

    @property
    def pairs(self) -> bool:
        """Whether the panel of large M is int16 pairs."""
        return uses_pairs(self.spec, self.isa.name)

    @property
    def squares(self) -> bool:
        """Whether many rows are multiplied two by two."""
        return uses_squares(self.spec, self.isa.name)

    @property
    def k_padded(self) -> int:
        """K of the scratch rows."""
        return padded_k(self.spec)

    def row_outputs(self, many: bool) -> dict[str, Any]:
        """Where the quantiser writes; of `many` rows in the layout that their product reads."""
        k, wide = self.kernel, many and self.pairs
        q = tir.buffer_at(k["codes"], "int16" if wide else "int8")
        sc = tir.buffer_at(k["sums"], "int32" if correction_kind(self.isa, self.spec) == "int" else "float32")
        name = "q16" if wide else ("q2x8" if many and self.squares else "q")
        return {name: q, "sa": k["scales"], "sc": sc, "rows": self.rows}


def new_kernel(name: str, spec: QuantMatmulSpec) -> Any:
    types = {
        "m": "int64",
        "threads": "int64",
        "one": "int64",
        "x": "*" + spec.x_dtype,
        "w": "int64",
        "bias": "*float32",
    }
    types |= {"residual": "*" + spec.x_dtype, "y": "*" + spec.x_dtype, "codes": "int64", "scales": "*float32"}
    types |= {"sums": "int64", "panel": "int64", "counter": "int64"}
    return tir.Kernel(name, [(a, types[a]) for a in ARGUMENTS])


def stream_of(c: Context, block: Any) -> Stream:
    views = Stream.views_of(c.spec, c.kernel["w"])
    return Stream(c.isa, c.spec, views, tir.let(block * c.geometry.block_bytes))


def row_tiles(c: Context) -> Any:
    """Return how many row tiles cover M."""
    return tir.let(T.truncdiv(c.kernel["m"] + (c.rows - 1), T.int64(c.rows)))


def shared_range(total: Any, thread: Any, threads: Any) -> tuple[Any, Any]:
    """Return [first, last) of a thread's contiguous part of `total` things."""
    first = tir.let(T.truncdiv(thread * total, threads))
    return first, tir.let(T.truncdiv((thread + 1) * total, threads))


def units(c: Context) -> int:
    """Return how many column blocks (of a gated epilogue: pairs of blocks) there are."""
    parts = 2 if c.spec.pair else 1
    return -(-(c.spec.n // parts) // BLOCK)


def finish_vector(c: Context, row: Any, at: Any, first: Any, second: Any) -> None:
    """Emit one vector of the output, columns [at, at + lanes) of a row; in the last block lane by lane."""
    n, lanes, y = c.spec.n_out, c.isa.lanes, c.kernel["y"]
    if n % BLOCK == 0:
        tir.from_f32(y, c.y_at(row, at), finished(c, row, at, lanes, first, second))
        return
    with tir.when(at + lanes <= n):
        tir.from_f32(y, c.y_at(row, at), finished(c, row, at, lanes, first, second))
    with tir.when(at + lanes > n):
        held = [tir.local("float32", lanes) for value in (first, second) if value is not None]
        for cell, value in zip(held, (first, second)):
            tir.store(cell, 0, value)
        with tir.loop(T.max(n - at, T.int64(0))) as i:
            values = [tir.load(cell, i) for cell in held]
            result = finished(c, row, at + i, 1, values[0], values[1] if len(values) > 1 else None)
            tir.from_f32(y, c.y_at(row, at + i), result)


def finished(c: Context, row: Any, at: Any, width: int, first: Any, second: Any) -> Any:
    """Return `width` finished values of columns `at` and on; `second` is the up part of a gated pair."""
    spec, kernel, n = c.spec, c.kernel, c.spec.n_out
    if spec.bias:
        first = first + tir.load(kernel["bias"], at, width)
    if second is not None:
        if spec.bias:
            second = second + tir.load(kernel["bias"], at + n, width)
        first = (silu(first) if spec.epilogue == "silu_pair" else gelu(first)) * second
    if spec.softcap:
        first = tanh(first * tir.f32(1 / spec.softcap, width)) * tir.f32(spec.softcap, width)
    if spec.residual:
        first = first + tir.to_f32(kernel["residual"], row * n + at, width)
    return first
