"""silu(gate) * up on an OpenCL device: one pass over both, four elements a work-item."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...compiler.operator import Configuration
from ...compiler.target import Target
from ..shared.device_check import random_tensors, wrong
from ..shared.device_form import device_form, lanes_space, only_float32
from .reference import gated_silu
from .spec import GatedSiluSpec


def lower(spec: GatedSiluSpec, configuration: Configuration, target: Target) -> list[Any]:
    """Return the kernels `vectors` and `elements`: grid (count / lanes)."""
    from ..shared import device_tir as d

    found = []
    for name, width in (("vectors", 4), ("elements", 1)):
        kind = "*float32x4" if width == 4 else "*float32"
        args = [("gate", kind), ("up", kind), ("y", kind), ("count", "int32")]
        k = d.DeviceKernel(name, args, int(configuration["lanes"]))
        i = d.let(k.group[0] * k.lanes + k.lane)
        with d.when(i < k["count"]):
            gate, one = d.let(k["gate"][i]), d.f32(1.0, width)
            d.store(k["y"], i, gate / (one + d.exp(d.f32(0.0, width) - gate)) * k["up"][i])
        found.append(k.finish())
    return found


def bind(
    spec: GatedSiluSpec, configuration: Configuration, target: Target, library: Any
) -> Callable[..., None]:
    """Return `call(gate, up, y, count)` over fp32 buffers of `count` elements."""
    vectors, elements = library.function("vectors"), library.function("elements")
    lanes = int(configuration["lanes"])

    def call(gate: Any, up: Any, y: Any, count: int) -> None:
        kernel, items = (vectors, count // 4) if count % 4 == 0 else (elements, count)
        kernel((-(-items // lanes),), gate=gate, up=up, y=y, count=items)

    return call


def verify(spec: GatedSiluSpec, configuration: Configuration, session: Any, library: Any) -> str:
    """Multiply 1,000 and 1,001 elements; outputs start as NaN."""
    call = bind(spec, configuration, None, library)  # pyright: ignore[reportArgumentType]
    for count in (1000, 1001):
        gate, up = random_tensors(count, (count,), (count,))
        y = session.upload(torch.full((count,), torch.nan))
        call(session.upload(gate * 8).buffer, session.upload(up).buffer, y.buffer, count)
        if problem := wrong(y.read(), gated_silu(spec, gate * 8, up), 1e-6, "gated SiLU"):
            return problem
    return ""


FORM = device_form(only_float32, lanes_space, lower, bind, verify, "kernels/gated_silu/tvm_opencl.py")
