"""rope on a CPU through TVM: one pass, the tables' row shared by all heads of a position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...compiler.errors import EdgeFormerError
from ...compiler.operator import Configuration, Declined, Form
from ...compiler.target import Target
from .space import space
from .spec import RopeSpec

PARALLEL_ELEMENTS = 1 << 15  # below it the launch costs more than the second thread saves

_SIZES = ("heads", "positions", "x_batch", "x_head", "x_position", "out_batch", "out_head", "out_position")


def decide(spec: RopeSpec, target: Target) -> Declined | None:
    """Accept every rope on a CPU that the back end knows."""
    if "tvm_llvm" not in target.backends:
        return Declined(f"target {target.name} has no tvm_llvm back end")
    return None


def lower(spec: RopeSpec, configuration: Configuration, target: Target) -> list[Any]:
    """Return the PrimFuncs `rope` (serial) and `rope_parallel` (over batch and position)."""
    from ..shared import tir
    from ..shared.isa import table
    from ..shared.tir import T
    from .tvm_emit import emit_rope_row

    lanes, functions = table.for_target(target).lanes, []
    pointers = [("x", "*" + spec.dtype), ("cos", "*float32"), ("sin", "*float32"), ("out", "*" + spec.dtype)]
    integers = [(name, "int64") for name in ("rows", *_SIZES, "table_batch", "table_position")]
    for name, rows_loop in (("rope", tir.loop), ("rope_parallel", tir.parallel)):
        k = tir.Kernel(name, pointers + integers)
        with rows_loop(k["rows"]) as row:  # rows = batch * positions
            b = tir.let(T.truncdiv(row, k["positions"]))
            t = tir.let(row - b * k["positions"])
            table_offset = tir.let(b * k["table_batch"] + t * k["table_position"])
            x_row = tir.let(b * k["x_batch"] + t * k["x_position"])
            out_row = tir.let(b * k["out_batch"] + t * k["out_position"])
            with tir.loop(k["heads"]) as h:
                x_offset, out_offset = tir.let(x_row + h * k["x_head"]), tir.let(out_row + h * k["out_head"])
                emit_rope_row(
                    spec, lanes, k["x"], x_offset, k["cos"], k["sin"], table_offset, k["out"], out_offset
                )
        functions.append(k.finish())
    return functions


def bind(spec: RopeSpec, configuration: Configuration, target: Target, library: Any) -> Callable[..., Any]:
    """Return call(x [B, H, T, D], cos, sin, out=None) -> out; `out` may be x, tables [T|B,T, rotary_dim/2].

    Any strides, as long as the last one is 1; otherwise the tensor is copied (x, tables) or refused (out).
    """
    serial, threaded = library.function("rope"), library.function("rope_parallel")
    dtype = getattr(torch, spec.dtype)

    def call(
        x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        batch, heads, positions, head_dim = x.shape
        if head_dim != spec.head_dim or x.dtype != dtype:
            raise EdgeFormerError(f"this rope was bound for {spec.key()}, not {x.dtype} {tuple(x.shape)}")
        _check_tables(cos, sin, batch, positions, spec.rotary_dim // 2)
        if x.stride(3) != 1:
            x = x.contiguous()
        if out is None:
            out = torch.empty(x.shape, dtype=x.dtype)
        elif out.stride(3) != 1 or out.shape != x.shape or out.dtype != x.dtype:
            raise EdgeFormerError("rope's out needs the shape and type of x, and a last stride of 1")
        if cos.stride() != sin.stride() or cos.stride(-1) != 1:
            cos, sin = cos.contiguous(), sin.contiguous()
        table_batch = cos.stride(0) if cos.dim() == 3 and cos.shape[0] > 1 else 0
        function = threaded if x.numel() >= PARALLEL_ELEMENTS and batch * positions > 1 else serial
        function(
            x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), batch * positions, heads, positions,
            *x.stride()[:3], *out.stride()[:3], table_batch, cos.stride(-2),
        )  # fmt: skip
        return out

    def row(x: int, cos: int, sin: int, out: int, heads: int) -> None:
        """One position, its heads side by side, at bare addresses; unchecked."""
        serial(x, cos, sin, out, 1, heads, 1, 0, spec.head_dim, 0, 0, spec.head_dim, 0, 0, 0)

    call.row = row  # pyright: ignore[reportFunctionMemberAccess]
    return call


def _check_tables(cos: torch.Tensor, sin: torch.Tensor, batch: int, positions: int, half: int) -> None:
    """Raise before a kernel could read past the end."""
    fits = cos.shape == sin.shape and cos.dtype == sin.dtype == torch.float32
    if not fits or cos.shape not in ((positions, half), (batch, positions, half), (1, positions, half)):
        raise EdgeFormerError(
            f"rope's tables have to be float32 [{positions}, {half}] or [{batch}, {positions}, {half}], "
            f"not {cos.dtype} {tuple(cos.shape)} and {sin.dtype} {tuple(sin.shape)}"
        )


FORM = Form(
    "tvm_cpu",
    "tvm_llvm",
    decide,
    space,
    bind,
    lower,
    ("kernels/rope", "kernels/shared", "compiler/backends/tvm_llvm.py"),
)
