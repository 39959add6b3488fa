"""The quantised matmul's OpenCL form: what it takes, how it is launched and how a device is verified."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from ...compiler.backends.opencl_device import class_of
from ...compiler.operator import Configuration, Declined
from ...compiler.target import Target
from ..shared.device_check import random_tensors, wrong
from ..shared.device_form import device_form
from .packing import BLOCK, pack
from .reference import quant_matmul as reference
from .spec import QuantMatmulSpec
from .weight_format import CanonicalWeight

TOLERANCE = 1e-5
FEW_ROWS = 8  # up to here four rows share a pass over the weight; above, tiles


def decide(spec: QuantMatmulSpec, target: Target) -> Declined | None:
    """Decline integer and bf16 activations, and 16-bit x."""
    if spec.activation != "float":
        return Declined(f"OpenCL kernels keep activations in float, not {spec.activation}")
    if spec.x_dtype != "float32":
        return Declined(f"OpenCL kernels take float32 activations, not {spec.x_dtype}")
    return None


def space(spec: QuantMatmulSpec, target: Target) -> list[dict[str, Any]]:
    """Return the configurations that fit the device's class, the default first."""
    work_group, local_bytes, _ = class_of(target)
    parts = 2 if spec.pair else 1
    rows = [n for n in (128, 64, 256) if n <= work_group and parts * n * 16 <= local_bytes]
    tiles = [n for n in (128, 64) if n <= work_group and parts * 4096 + 64 * n <= local_bytes]
    return [{"lanes": a, "tile_lanes": b} for a in rows for b in tiles]


def lower(spec: QuantMatmulSpec, configuration: Configuration, target: Target) -> list[Any]:
    """Return the kernels."""
    from .tvm_opencl import lower as emit

    return emit(spec, configuration, target)


def bind(
    spec: QuantMatmulSpec, configuration: Configuration, target: Target, library: Any
) -> Callable[..., None]:
    """Return `call(x, weight, bias, residual, y, m)` over buffers: x [m, K], y [m, N out], bias [N]; fp32."""
    kernels = {rows: library.function(f"rows{rows}") for rows in (1, 4)}
    tile = library.function("tile")
    blocks, tile_rows = -(-spec.n_out // BLOCK), int(configuration["tile_lanes"]) // 2

    def call(x: Any, weight: Any, bias: Any, residual: Any, y: Any, m: int) -> None:
        buffers = {
            "x": x,
            "w": weight,
            "w2": weight,
            "w1": weight,
            "bias": bias,
            "residual": residual,
            "y": y,
        }
        if m > FEW_ROWS:
            tile((blocks, -(-m // tile_rows)), **buffers, m=m, n=spec.n_out)
            return
        rows = 1 if m == 1 else 4
        kernels[rows]((blocks, -(-m // rows)), **buffers, m=m, n=spec.n_out)

    return call


def verify(spec: QuantMatmulSpec, configuration: Configuration, session: Any, library: Any) -> str:
    """Multiply 1, 5 and 11 rows by the first columns of a random weight; outputs start as NaN."""
    n = min(spec.n_out, 77)
    small = dataclasses.replace(spec, n=2 * n if spec.pair else n)
    target = Target("opencl", "opencl", "any", "", backends=("tvm_opencl",))
    call = bind(small, configuration, target, library)
    for m in (1, 5, 11):
        x, w, b, r = random_tensors(m, (m, spec.k), (small.n, spec.k), (small.n,), (m, n))
        weight = pack(CanonicalWeight.from_float(w, spec.weight), target, pair=spec.pair)
        bias, residual = b if spec.bias else None, r if spec.residual else None
        y = session.upload(torch.full((m, n), torch.nan))
        given = [None if t is None else session.upload(t).buffer for t in (bias, residual)]
        call(session.upload(x).buffer, session.upload(weight.buffer).buffer, *given, y.buffer, m)
        right = reference(small, x, weight.unpack(), bias, residual)
        if problem := wrong(y.read(), right, TOLERANCE, f"a product of {m} rows"):
            return problem
    return ""


FORM = device_form(
    decide, space, lower, bind, verify, "kernels/quant_matmul/tvm_opencl.py",
    "kernels/quant_matmul/tvm_opencl_weight.py",
)  # fmt: skip
