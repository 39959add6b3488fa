"""embedding on an OpenCL device: a work-item decodes one vector of a block and stores its own row's part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...compiler.operator import Configuration, Declined
from ...compiler.target import Target
from ..quant_matmul.packing import BLOCK, pack
from ..quant_matmul.weight_format import CanonicalWeight
from ..shared.device_check import random_tensors, wrong
from ..shared.device_form import device_form, lanes_space, only_float32
from . import reference
from .spec import TOLERANCE, EmbeddingSpec


def decide(spec: EmbeddingSpec, target: Target) -> Declined | None:
    """Decline 16-bit outputs and tables in a CPU's layout."""
    if spec.layout != "n32.unsigned":
        return Declined(f"OpenCL kernels read tables in layout n32.unsigned, not {spec.layout}")
    return only_float32(spec, target)


def lower(spec: EmbeddingSpec, configuration: Configuration, target: Target) -> list[Any]:
    """Return the kernel `embedding`: grid (parts of a row / lanes, ids). Ids out of range read row 0."""
    from ..quant_matmul.tvm_opencl_weight import WEIGHT_ARGS, WeightReader
    from ..shared import device_tir as d

    args = [("ids", "*int32"), *WEIGHT_ARGS, ("y", "*float32"), ("n", "int32")]
    k = d.DeviceKernel("embedding", args, int(configuration["lanes"]))
    reader = WeightReader(spec.weight, spec.k, k)
    wanted = d.let(k["ids"][k.group[1]])
    row = d.let(d.choose(d.both(wanted >= 0, wanted < k["n"]), wanted, d.i32(0)))
    base, column = d.let(reader.base(d.divide(row, BLOCK))), d.let(d.remainder(row, BLOCK))
    quad, inside = d.let(d.divide(column, 4)), d.let(d.remainder(column, 4))
    item = d.let(k.group[0] * k.lanes + k.lane)
    vector = d.let(item * reader.per_row + d.divide(quad, reader.quads))

    def mine(four: Any) -> Any:
        parts = [d.lane_of(four, i) for i in range(4)]
        upper = d.choose(inside == 3, parts[3], parts[2])
        return d.choose(inside == 0, parts[0], d.choose(inside == 1, parts[1], upper))

    with d.when(vector < reader.total):
        if spec.weight.is_float:
            found = reader.floats(base, vector)
            values = [found[0] if len(found) == 1 else d.choose(d.remainder(quad, 2) == 0, *map(mine, found))]
            values = [mine(values[0])] if len(found) == 1 else values
        else:
            codes, group = reader.codes(base, vector)
            scale = reader.scales(base, group, quad)
            offset = reader.offsets(base, group, quad, scale)
            values = [mine(d.let(code * scale + offset)) for code in codes]
        for i, value in enumerate(values):
            at = d.let(item * reader.depth + i)
            with d.when(at < spec.k):
                d.store(k["y"], k.group[1] * spec.k + at, value * d.f32(spec.factor))
    return [k.finish()]


def bind(
    spec: EmbeddingSpec, configuration: Configuration, target: Target, library: Any
) -> Callable[..., None]:
    """Return `call(ids, weight, y, count)`: int32 ids [count], y fp32 [count, K]."""
    kernel, lanes = library.function("embedding"), int(configuration["lanes"])
    depth = 1 if spec.weight.is_float else 4 * (8 // spec.weight.plane_bits[0])
    rows = spec.k if spec.weight.is_float else spec.weight.groups(spec.k) * spec.weight.group_size
    parts = -(-rows // depth // lanes)

    def call(ids: Any, weight: Any, y: Any, count: int) -> None:
        kernel((parts, count), ids=ids, w=weight, w2=weight, w1=weight, y=y, n=spec.n)

    return call


def verify(spec: EmbeddingSpec, configuration: Configuration, session: Any, library: Any) -> str:
    """Look seven rows of a random table up; the output starts as NaN."""
    target = Target("opencl", "opencl", "any", "", backends=("tvm_opencl",))
    n = min(spec.n, 77)
    (table,) = random_tensors(3, (n, spec.k))
    weight = pack(CanonicalWeight.from_float(table, spec.weight), target)
    ids = torch.arange(7, dtype=torch.int64) * 5 % n
    y = session.upload(torch.full((7, spec.k), torch.nan))
    call = bind(spec, configuration, target, library)
    call(session.upload(ids.int()).buffer, session.upload(weight.buffer).buffer, y.buffer, 7)
    small = EmbeddingSpec.of(weight, factor=spec.factor)
    return wrong(y.read(), reference.embedding(small, ids, weight), TOLERANCE["float32"], "an embedding")


FORM = device_form(
    decide, lanes_space, lower, bind, verify, "kernels/embedding/tvm_opencl.py",
    "kernels/quant_matmul/tvm_opencl_weight.py",
)  # fmt: skip
