"""norm on an OpenCL device: one work-group a row, which is read twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...compiler.operator import Configuration, Declined
from ...compiler.target import Target
from ..shared.device_check import random_tensors, wrong
from ..shared.device_form import device_form, lanes_space, only_float32
from . import reference
from .spec import TOLERANCE, NormSpec


def decide(spec: NormSpec, target: Target) -> Declined | None:
    """Decline quantised outputs and 16-bit types."""
    if spec.group_size:
        return Declined("OpenCL kernels keep activations in float: a norm that quantises has none")
    return only_float32(spec, target)


def lower(spec: NormSpec, configuration: Configuration, target: Target) -> list[Any]:
    """Return the kernel `norm`: grid (rows); row r is at first + r // inner * outer + r % inner * inner_st.

    Rows of whole vectors are read and written so; their offsets and strides count vectors then.
    """
    from ..shared import device_tir as d

    four = spec.dim % 4 == 0
    width, kind = (4, "*float32x4") if four else (1, "*float32")
    places = [f"{t}_{part}" for t in ("x", "y") for part in ("first", "outer", "inner")]
    names = ("x", "weight", "bias", "residual", "y")
    args = [(n, kind) for n in names] + [(n, "int32") for n in ("inner", *places)]
    k = d.DeviceKernel("norm", args, int(configuration["lanes"]), in_place=True)
    outer = d.let(d.truncated_division(k.group[0], k["inner"]))
    inside = d.let(k.group[0] - outer * k["inner"])
    at = {t: d.let(k[f"{t}_first"] + outer * k[f"{t}_outer"] + inside * k[f"{t}_inner"]) for t in ("x", "y")}
    memory = d.local_memory("float32", k.lanes)
    count = spec.dim // width
    dtype = "float32x4" if four else "float32"
    constant = lambda value: d.f32(value, width)  # noqa: E731

    def total(term: Any) -> Any:
        """Return the row's sum of term(x) in every lane."""
        acc = d.Register(dtype, constant(0.0))
        with d.strided(k, count) as i:
            acc.add(term(d.let(k["x"][at["x"] + i])))
        value = acc.get()
        d.store(memory, k.lane, d.sum_of(value) if four else value)
        d.fold(k, memory, d.add)
        found = d.let(memory[0])
        d.barrier()
        return found

    mean = constant(0.0)
    if spec.kind == "layer":
        mean = d.let(d.splat(total(lambda x: x) * d.f32(1.0 / spec.dim), width))
    squares = total(lambda x: (x - mean) * (x - mean))
    inverse = d.let(d.f32(1.0) / d.sqrt(squares * d.f32(1.0 / spec.dim) + d.f32(spec.eps)))
    with d.strided(k, count) as i:
        weight = k["weight"][i]
        if spec.weight_offset:
            weight = weight + constant(spec.weight_offset)
        y = (k["x"][at["x"] + i] - mean) * d.splat(inverse, width) * weight
        if spec.bias:
            y = y + k["bias"][i]
        if spec.residual:
            y = y + k["residual"][at["y"] + i]
        d.store(k["y"], at["y"] + i, y)
    return [k.finish()]


def bind(spec: NormSpec, configuration: Configuration, target: Target, library: Any) -> Callable[..., None]:
    """Return `call(x, weight, bias, residual, y, rows, inner=1, x_at=None, y_at=None)` over fp32 buffers.

    `x_at` and `y_at` are (first element, stride of outer rows, stride of the `inner` rows of each), in
    elements; None: rows follow each other. The residual lies as y does, which may be x.
    """
    kernel, width = library.function("norm"), 4 if spec.dim % 4 == 0 else 1

    def call(
        x: Any, weight: Any, bias: Any, residual: Any, y: Any, rows: int, inner: int = 1, x_at: Any = None,
        y_at: Any = None,
    ) -> None:  # fmt: skip
        places = {}
        for name, place in (("x", x_at), ("y", y_at)):
            for part, value in zip(("first", "outer", "inner"), place or (0, inner * spec.dim, spec.dim)):
                places[f"{name}_{part}"] = value // width
        kernel((rows,), x=x, weight=weight, bias=bias, residual=residual, y=y, inner=inner, **places)

    return call


def verify(spec: NormSpec, configuration: Configuration, session: Any, library: Any) -> str:
    """Normalise seven rows; the output starts as NaN."""
    x, weight, bias, residual = random_tensors(1, (7, spec.dim), (spec.dim,), (spec.dim,), (7, spec.dim))
    bias, residual = bias if spec.bias else None, residual if spec.residual else None
    buffers = [None if t is None else session.upload(t).buffer for t in (x, weight, bias, residual)]
    y = session.upload(torch.full_like(x, torch.nan))
    bind(spec, configuration, None, library)(*buffers, y.buffer, 7)  # pyright: ignore[reportArgumentType]
    return wrong(y.read(), reference.norm(spec, x, weight, bias, residual), TOLERANCE["float32"], "a norm")


FORM = device_form(decide, lanes_space, lower, bind, verify, "kernels/norm/tvm_opencl.py")
