"""norm on a CPU through TVM: two or three short passes over a row that stays in L1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...compiler.errors import EdgeFormerError
from ...compiler.operator import Configuration, Declined, Form
from ...compiler.target import Target
from .space import space
from .spec import NormSpec

PARALLEL_ELEMENTS = 1 << 15  # below it the launch costs more than the second thread saves


def decide(spec: NormSpec, target: Target) -> Declined | None:
    """Accept every norm on a CPU that the back end knows."""
    if "tvm_llvm" not in target.backends:
        return Declined(f"target {target.name} has no tvm_llvm back end")
    return None


def lower(spec: NormSpec, configuration: Configuration, target: Target) -> list[Any]:
    """Return the PrimFuncs `norm` (serial over rows) and `norm_parallel`."""
    from ..shared import tir
    from ..shared.isa import table
    from . import tvm_emit

    isa = table.for_target(target)
    functions = []
    for name, rows_loop in (("norm", tir.loop), ("norm_parallel", tir.parallel)):
        args = [
            ("x", "*" + spec.dtype),
            ("weight", "*" + spec.weight_dtype),
            ("bias", "*" + spec.weight_dtype),
            ("residual", "*" + spec.dtype),
        ]
        if spec.group_size:
            args += [("codes", "*int8"), ("scale", "*float32"), ("sums", "*int32")]
        else:
            args += [("out", "*" + spec.out_dtype)]
        k = tir.Kernel(name, [*args, ("rows", "int64"), ("x_stride", "int64")])
        with rows_loop(k["rows"]) as row:
            x_offset = tir.let(row * k["x_stride"])
            emitter = tvm_emit.NormRow(spec, isa.lanes, int(configuration["accumulators"]), k["x"], x_offset)
            if spec.group_size:
                emitter.quantize(k["weight"], k["bias"], k["codes"], k["scale"], k["sums"], row)
            else:
                at = tir.let(row * spec.dim)
                emitter.store(k["weight"], k["bias"], k["out"], at, k["residual"], at)
        functions.append(k.finish())
    return functions


def bind(spec: NormSpec, configuration: Configuration, target: Target, library: Any) -> Callable[..., Any]:
    """Return call(x [..., D], weight [D], bias=None, residual=None) -> y, or (codes, scale, sums)."""
    serial, threaded = library.function("norm"), library.function("norm_parallel")
    out_dtype, dim, groups = getattr(torch, spec.out_dtype), spec.dim, spec.groups

    def call(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> Any:  # fmt: skip
        _check(x, spec.dtype, dim)
        weight = _vector(weight, spec.weight_dtype, dim)
        if spec.bias:
            if bias is None:
                raise EdgeFormerError("this norm was bound with a bias, and called without one")
            bias = _vector(bias.to(weight.dtype), spec.weight_dtype, dim)
        if spec.residual:
            if residual is None or residual.shape != x.shape:
                raise EdgeFormerError(f"this norm was bound with a residual of the shape {tuple(x.shape)}")
            _check(residual, spec.dtype, dim)
            residual = residual.contiguous()
        rows = x.numel() // dim
        flat = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(rows, dim).contiguous()
        function = threaded if rows > 1 and rows * dim >= PARALLEL_ELEMENTS else serial
        added = residual.data_ptr() if spec.residual and residual is not None else 0
        inputs = (flat.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), added)
        if groups:
            codes = torch.empty(x.shape, dtype=torch.int8)
            scale = torch.empty((*x.shape[:-1], groups), dtype=torch.float32)
            sums = torch.empty((*x.shape[:-1], groups), dtype=torch.int32)
            function(*inputs, codes.data_ptr(), scale.data_ptr(), sums.data_ptr(), rows, flat.stride(0))
            return codes, scale, sums
        out = torch.empty(x.shape, dtype=out_dtype)
        function(*inputs, out.data_ptr(), rows, flat.stride(0))
        return out

    def row(x: int, weight: int, bias: int, out: int, residual: int = 0, rows: int = 1) -> None:
        """Contiguous rows at bare addresses, unchecked: for callers that have checked."""
        serial(x, weight, bias, residual, out, rows, dim)

    call.row = None if groups else row  # pyright: ignore[reportFunctionMemberAccess]
    return call


def _vector(tensor: torch.Tensor, dtype: str, dim: int) -> torch.Tensor:
    _check(tensor, dtype, dim)
    return tensor.contiguous()


def _check(tensor: torch.Tensor, dtype: str, dim: int) -> None:
    """Raise before a kernel could read past the end."""
    if tensor.shape[-1] != dim or tensor.dtype != getattr(torch, dtype):
        raise EdgeFormerError(
            f"this norm was bound for {dtype} [..., {dim}], not {tensor.dtype} {tuple(tensor.shape)}"
        )


FORM = Form(
    "tvm_cpu",
    "tvm_llvm",
    decide,
    space,
    bind,
    lower,
    ("kernels/norm", "kernels/shared", "compiler/backends/tvm_llvm.py"),
)
