"""The quantised matmul for OpenCL devices: a matrix-vector product of 1 or 4 rows, and a tiled product.

A work-group has 32 columns (a gate's and an up block for a pair); fp32 accumulates. Every `lane` walks the
block's 16-byte vectors with the stride of the group, four columns of each are summed in one float32x4.
"""

from __future__ import annotations

from typing import Any

from ..shared import device_tir as d
from .packing import BLOCK
from .spec import QuantMatmulSpec
from .tvm_opencl_weight import WEIGHT_ARGS, WeightReader

STEP = 32  # inputs of a tile
_GELU = 0.7978845608028654  # sqrt(2 / pi)


def lower(spec: QuantMatmulSpec, configuration: Any, target: Any) -> list[Any]:
    """Return the kernels `rows1`, `rows4` and `tile`."""
    lanes = configuration["lanes"]
    return [_rows(spec, 1, lanes), _rows(spec, 4, lanes), _tile(spec, configuration["tile_lanes"])]


def _args(spec: QuantMatmulSpec, vectors: bool) -> list[tuple[str, str]]:
    found = [("x", "*float32x4" if vectors else "*float32"), *WEIGHT_ARGS]
    found += [
        ("bias", "*float32"),
        ("residual", "*float32"),
        ("y", "*float32"),
        ("m", "int32"),
        ("n", "int32"),
    ]
    return found


def _aligned(spec: QuantMatmulSpec) -> bool:
    """Whether rows of x are whole groups (and blocks), read in vectors."""
    step = 4 if spec.weight.is_float else spec.weight.block_size or spec.weight.group_size
    return spec.k % step == 0 and spec.k % 4 == 0


def _rows(spec: QuantMatmulSpec, rows: int, lanes: int) -> Any:
    """Grid (column blocks, rows / `rows`)."""
    vectors = _aligned(spec) and not spec.weight.is_float
    k = d.DeviceKernel(f"rows{rows}", _args(spec, vectors), lanes)
    reader = WeightReader(spec.weight, spec.k, k)
    parts = 2 if spec.pair else 1
    block, first = k.group[0], k.group[1] * rows
    row = [d.let(d.minimum(first + r, k["m"] - 1)) for r in range(rows)]
    bases = [d.let(reader.base(block * parts + p)) for p in range(parts)]
    zero = d.f32(0.0, 4)
    acc = [[[d.Register("float32x4", zero) for _ in range(reader.quads)] for _ in row] for _ in bases]
    with d.loop(-(-reader.total // lanes)) as t:
        v = d.let(t * lanes + k.lane)
        with d.when(v < reader.total):
            _add_vector(spec, k, reader, v, row, bases, acc, vectors)
    memory = [d.local_memory("float32x4", lanes) for _ in range(parts)]
    for r in range(rows):
        for q in range(reader.quads):
            for p in range(parts):
                d.store(memory[p], k.lane, acc[p][r][q].get())
            for p in range(parts):
                d.fold(k, memory[p], d.add, reader.per_row)
            with d.when(d.both(k.lane < reader.per_row, first + r < k["m"])):
                values = [d.let(memory[p][k.lane]) for p in range(parts)]
                column = block * BLOCK + (k.lane * reader.quads + q) * 4
                _finish(spec, k, first + r, column, values)
            if (r, q) != (rows - 1, reader.quads - 1):
                d.barrier()
    return k.finish()


def _add_vector(
    spec: QuantMatmulSpec, k: Any, reader: WeightReader, v: Any, row: list[Any], bases: list[Any], acc: Any,
    vectors: bool,
) -> None:  # fmt: skip
    start, quad = reader.split(v)
    start = d.let(start)
    x = [_inputs(spec, k, r, start, reader.depth, vectors) for r in row]
    if spec.weight.is_float:
        for p, base in enumerate(bases):
            for q, w in enumerate(reader.floats(base, v)):
                for r in range(len(row)):
                    acc[p][r][q].add(w * d.splat(x[r][0]))
        return
    sums = [d.let(sum(xs[1:], xs[0])) for xs in x]
    for p, base in enumerate(bases):
        codes, group = reader.codes(base, v)
        scale = reader.scales(base, group, quad)
        offset = reader.offsets(base, group, quad, scale)
        dots = [d.Register("float32x4", codes[0] * d.splat(xs[0])) for xs in x]
        for i, code in enumerate(codes[1:], 1):
            code = d.let(code)
            for dot, xs in zip(dots, x):
                dot.add(code * d.splat(xs[i]))
        for r, dot in enumerate(dots):
            acc[p][r][0].add(dot.get() * scale + d.splat(sums[r]) * offset)


def _inputs(spec: QuantMatmulSpec, k: Any, row: Any, start: Any, depth: int, vectors: bool) -> list[Any]:
    """Return x[row, start : start + depth] as scalars."""
    if vectors:
        loaded = [d.let(k["x"][row * (spec.k // 4) + d.divide(start, 4) + i]) for i in range(depth // 4)]
        return [d.let(d.lane_of(four, i)) for four in loaded for i in range(4)]
    if spec.weight.is_float or _aligned(spec):
        return [d.let(k["x"][row * spec.k + start + i]) for i in range(depth)]
    at = row * spec.k + start
    return [d.let(d.guarded(start + i < spec.k, k["x"][at + i], d.f32(0.0))) for i in range(depth)]


def _tile(spec: QuantMatmulSpec, lanes: int) -> Any:
    """Grid (column blocks, rows / (lanes / 2)): each work-item has 4 rows x 4 columns of the tile."""
    vectors, rows = spec.k % STEP == 0, lanes // 2
    k = d.DeviceKernel("tile", _args(spec, vectors), lanes)
    reader = WeightReader(spec.weight, spec.k, k)
    parts = 2 if spec.pair else 1
    block, first = k.group[0], d.let(k.group[1] * rows)
    quad, strip = d.let(d.remainder(k.lane, 8)), d.let(d.divide(k.lane, 8))
    panel = [d.local_memory("float32x4", STEP * 8) for _ in range(parts)]  # [input][quad of columns]
    inputs = d.local_memory("float32", STEP * rows)  # [input][row]
    acc = [[d.Register("float32x4", d.f32(0.0, 4)) for _ in range(4)] for _ in range(parts)]
    with d.loop(-(-spec.k // STEP)) as t:
        for p in range(parts):
            _fill_panel(k, reader, reader.base(block * parts + p), t, panel[p])
        _fill_inputs(spec, k, t, first, rows, inputs, vectors)
        d.barrier()
        with d.loop(STEP) as i:
            x = d.let(d.load4(inputs, i * rows + strip * 4))
            for p in range(parts):
                w = d.let(panel[p][i * 8 + quad])
                for r in range(4):
                    acc[p][r].add(w * d.splat(d.lane_of(x, r)))
        d.barrier()
    for r in range(4):
        row = d.let(first + strip * 4 + r)
        with d.when(row < k["m"]):
            _finish(spec, k, row, block * BLOCK + quad * 4, [acc[p][r].get() for p in range(parts)])
    return k.finish()


def _fill_panel(k: Any, reader: WeightReader, base: Any, t: Any, panel: Any) -> None:
    """Write the values of STEP inputs x 32 columns; zeros behind the last."""
    base, count = d.let(base), STEP // reader.depth * reader.per_row
    with d.loop(-(-count // k.lanes)) as turn:
        i = d.let(turn * k.lanes + k.lane)
        with d.when(i < count):
            v = d.let(t * count + i)
            start, quad = (d.let(e) for e in reader.split(i))
            with d.when(v < reader.total):
                if reader.fmt.is_float:
                    for q, w in enumerate(reader.floats(base, v)):
                        d.store(panel, start * 8 + quad + q, w)
                else:
                    codes, group = reader.codes(base, v)
                    scale = reader.scales(base, group, quad)
                    offset = reader.offsets(base, group, quad, scale)
                    for j, code in enumerate(codes):
                        d.store(panel, (start + j) * 8 + quad, code * scale + offset)
            with d.when(v >= reader.total):
                for j in range(reader.depth):
                    for q in range(reader.quads):
                        d.store(panel, (start + j) * 8 + quad + q, d.f32(0.0, 4))


def _fill_inputs(
    spec: QuantMatmulSpec, k: Any, t: Any, first: Any, rows: int, inputs: Any, vectors: bool
) -> None:
    """Write x[first : first + rows, STEP inputs], inputs outermost; zeros behind the last row and input."""
    with d.loop(rows * (STEP // 4) // k.lanes) as turn:
        i = d.let(turn * k.lanes + k.lane)
        row, part = d.let(d.divide(i, STEP // 4)), d.let(d.remainder(i, STEP // 4))
        there = first + row < k["m"]
        if vectors:
            at = (first + row) * (spec.k // 4) + t * (STEP // 4) + part
            x = d.Register("float32x4", d.f32(0.0, 4))
            with d.when(there):
                x.set(k["x"][at])
            for j in range(4):
                d.store(inputs, (part * 4 + j) * rows + row, d.lane_of(x.get(), j))
        else:
            for j in range(4):
                column = t * STEP + part * 4 + j
                value = d.guarded(
                    d.both(there, column < spec.k), k["x"][(first + row) * spec.k + column], d.f32(0.0)
                )
                d.store(inputs, (part * 4 + j) * rows + row, value)


def _finish(spec: QuantMatmulSpec, k: Any, row: Any, column: Any, values: list[Any]) -> None:
    """Write four columns of y: bias, epilogue, softcap, residual. `k["n"]` are y's columns."""
    column = d.let(column)
    for j in range(4):
        here = d.let(column + j)
        with d.when(here < k["n"]):
            y = [d.lane_of(v, j) for v in values]
            if spec.bias:
                y = [v + k["bias"][here + p * k["n"]] for p, v in enumerate(y)]
            out = d.let(y[0])
            if spec.epilogue == "silu_pair":
                out = d.let(out / (d.f32(1.0) + d.exp(d.f32(0.0) - out)) * y[1])
            elif spec.epilogue == "gelu_pair":
                inner = (out + out * out * out * d.f32(0.044715)) * d.f32(_GELU)
                out = d.let(out * d.f32(0.5) * (d.f32(1.0) + d.tanh(inner)) * y[1])
            if spec.softcap:
                out = d.let(d.tanh(out / d.f32(spec.softcap)) * d.f32(spec.softcap))
            at = row * k["n"] + here
            d.store(k["y"], at, out + k["residual"][at] if spec.residual else out)
