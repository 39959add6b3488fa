"""The CPU form: attention over latents or expanded keys, and vector times matrix for w_uk and w_uv."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...compiler.target import Target
from ..attention import tvm_cpu as attention
from ..attention.tvm_math import Registers
from ..shared import tir
from ..shared.isa.table import Isa, by_name
from ..shared.tir import T
from .spec import MlaSpec

_ROWS = 4  # rows of x that share a load of the weight
_STRIDES = [f"{tensor}_{stride}" for tensor in ("x", "y") for stride in ("sb", "sh", "st")]


def lower(spec: MlaSpec, configuration: Mapping[str, Any], target: Target) -> list[Any]:
    """Return the inner attention's PrimFuncs, and `absorb` and `project` for the absorbed mode."""
    functions = attention.lower(spec.inner(), configuration, target)
    if spec.mode == "expanded":
        return functions
    isa = by_name(str(configuration.get("isa") or target.isa))
    rank, wdtype = spec.kv_lora_rank, spec.weight_dtype
    absorb = _per_head("absorb", isa, spec.qk_nope_head_dim, rank, spec.q_dtype, wdtype, "float32")
    project = _per_head("project", isa, rank, spec.v_head_dim, "float32", wdtype, spec.q_dtype)
    return [*functions, absorb, project]


def _per_head(name: str, isa: Isa, k: int, n: int, x_type: str, w_type: str, y_type: str) -> Any:
    """y[b, h, t] = x[b, h, t] @ w[h], w [H, K, N]; a unit of work is a head and a block of columns."""
    kernel = tir.Kernel(
        name,
        [
            ("threads", "int64"), ("batch", "int64"), ("heads", "int64"), ("tq", "int64"),
            ("x", "*" + x_type), ("w", "*" + w_type), ("y", "*" + y_type),
            *((s, "int64") for s in _STRIDES),
        ],
    )  # fmt: skip
    lanes = isa.lanes
    vectors = _column_vectors(n // lanes, isa.registers)
    blocks = n // (lanes * vectors)
    units = tir.let(kernel["heads"] * blocks)
    rows = tir.let(kernel["batch"] * kernel["tq"])
    with tir.parallel(units) as unit:
        h = tir.let(T.truncdiv(unit, T.int64(blocks)))
        column = tir.let(T.truncmod(unit, T.int64(blocks)) * (lanes * vectors))
        weight = tir.let(h * (k * n) + column)
        whole = tir.let(T.truncdiv(rows, T.int64(_ROWS)))
        with tir.loop(whole) as tile:
            _rows(kernel, isa, k, n, h, tir.let(tile * _ROWS), _ROWS, weight, column, vectors)
        with tir.loop(tir.let(rows - whole * _ROWS)) as rest:
            _rows(kernel, isa, k, n, h, tir.let(whole * _ROWS + rest), 1, weight, column, vectors)
    return kernel.finish()


def _rows(
    kernel: Any, isa: Isa, k: int, n: int, h: Any, row0: Any, rows: int, weight: Any, column: Any,
    vectors: int,
) -> None:  # fmt: skip
    lanes, acc = isa.lanes, Registers(rows * vectors, isa.lanes)
    at = {name: [_row_at(kernel, name, h, row0 + r) for r in range(rows)] for name in ("x", "y")}
    for i in range(rows * vectors):
        acc[i] = tir.f32(0.0, lanes)
    with tir.loop(k) as i:
        values = Registers(vectors, lanes)
        for v in range(vectors):
            values[v] = tir.to_f32(kernel["w"], weight + i * n + v * lanes, lanes)
        for r in range(rows):
            x = tir.let(tir.to_f32(kernel["x"], at["x"][r] + i, 1))
            for v in range(vectors):
                acc.add_product(r * vectors + v, values[v], tir.splat(x, lanes))
    for r in range(rows):
        for v in range(vectors):
            tir.from_f32(kernel["y"], at["y"][r] + column + v * lanes, acc[r * vectors + v])


def _row_at(kernel: Any, name: str, h: Any, row: Any) -> Any:
    b, t = T.truncdiv(row, kernel["tq"]), T.truncmod(row, kernel["tq"])
    return tir.let(b * kernel[f"{name}_sb"] + h * kernel[f"{name}_sh"] + t * kernel[f"{name}_st"])


def _column_vectors(vectors: int, registers: int) -> int:
    """Return the vectors of a column block: a divisor, few enough that _ROWS rows fit the registers."""
    most = min(4, (registers - 2) // (_ROWS + 1))
    return max(v for v in range(1, most + 1) if vectors % v == 0)
