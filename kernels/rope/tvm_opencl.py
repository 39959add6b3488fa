"""rope on an OpenCL device, in place: a work-item turns four elements and their partners."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...compiler.operator import Configuration
from ...compiler.target import Target
from ..shared.device_check import random_tensors, wrong
from ..shared.device_form import device_form, lanes_space, only_float32
from . import reference
from .spec import TOLERANCE, RopeSpec


def _width(spec: RopeSpec) -> int:
    """Elements of one load: whole vectors where heads and halves consist of them."""
    half = spec.rotary_dim if spec.interleaved else spec.rotary_dim // 2
    return 4 if half % 4 == 0 and spec.head_dim % 4 == 0 else 1


def lower(spec: RopeSpec, configuration: Configuration, target: Target) -> list[Any]:
    """Return the kernel `rope`: grid (turns of all heads / lanes, rows); row r is token r % tokens.

    The angle's row of the tables is max(0, position + token - pads[r // tokens]), from `table` on.
    """
    from ..shared import device_tir as d

    width, half = _width(spec), spec.rotary_dim // 2
    x_kind = "*float32x4" if width == 4 else "*float32"
    table_width = (2 if spec.interleaved else 4) if width == 4 else 1
    table_kind = f"*float32x{table_width}" if table_width > 1 else "*float32"
    numbers = ("tokens", "position", "table", "heads", "row_st", "first")
    args = [("x", x_kind), ("cos", table_kind), ("sin", table_kind), ("pads", "*int32")]
    k = d.DeviceKernel(
        "rope", args + [(n, "int32") for n in numbers], int(configuration["lanes"]), in_place=True
    )
    row = k.group[1]
    sequence = d.let(d.truncated_division(row, k["tokens"]))
    place = k["position"] + (row - sequence * k["tokens"]) - k["pads"][sequence]
    place = d.let(d.maximum(place, d.i32(0)))
    turns = half // table_width  # items of a head
    item = d.let(k.group[0] * k.lanes + k.lane)
    with d.when(item < k["heads"] * turns):
        head, turn = d.let(d.divide(item, turns)), d.let(d.remainder(item, turns))
        angle = d.let(k["table"] + place * turns + turn)
        cos, sin = d.let(k["cos"][angle]), d.let(k["sin"][angle])
        start = k["first"] + row * k["row_st"] + head * (spec.head_dim // width)
        if not spec.interleaved or width == 1:
            step = 2 if spec.interleaved else 1
            other = 1 if spec.interleaved else half // width
            at = d.let(start + turn * step)
            a, b = d.let(k["x"][at]), d.let(k["x"][at + other])
            d.store(k["x"], at, a * cos - b * sin)
            d.store(k["x"], at + other, b * cos + a * sin)
        else:
            at = d.let(start + turn)
            x = [d.lane_of(d.let(k["x"][at]), i) for i in range(4)]
            out = []
            for pair in range(2):
                a, b, c, s = x[2 * pair], x[2 * pair + 1], d.lane_of(cos, pair), d.lane_of(sin, pair)
                out += [a * c - b * s, b * c + a * s]
            d.store(k["x"], at, d.vector(out))
    return [k.finish()]


def bind(spec: RopeSpec, configuration: Configuration, target: Target, library: Any) -> Callable[..., None]:
    """Return `call(x, cos, sin, pads, rows, tokens, position, heads, row_st, first=0, table=0)`.

    x holds `heads` heads from element `first` of each of `rows` rows, `row_st` apart (multiples of 4);
    cos and sin are fp32 tables [places, rotary_dim / 2], read from `table` on; pads int32 [rows / tokens].
    """
    kernel, width, half = library.function("rope"), _width(spec), spec.rotary_dim // 2
    per_turn = (2 if spec.interleaved else 4) if width == 4 else 1
    lanes = int(configuration["lanes"])

    def call(
        x: Any, cos: Any, sin: Any, pads: Any, rows: int, tokens: int, position: int, heads: int, row_st: int,
        first: int = 0, table: int = 0,
    ) -> None:  # fmt: skip
        kernel(
            (-(-heads * (half // per_turn) // lanes), rows), x=x, cos=cos, sin=sin, pads=pads, tokens=tokens,
            position=position, table=table // per_turn, heads=heads, row_st=row_st // width,
            first=first // width,
        )  # fmt: skip

    return call


def verify(spec: RopeSpec, configuration: Configuration, session: Any, library: Any) -> str:
    """Turn 2 sequences x 3 tokens x 5 heads."""
    half = spec.rotary_dim // 2
    x, angles = random_tensors(2, (2, 5, 3, spec.head_dim), (9, half))
    cos, sin, pads = angles.cos(), angles.sin(), torch.tensor([0, 1], dtype=torch.int32)
    on_device = session.upload(x.transpose(1, 2).reshape(6, -1))
    call = bind(spec, configuration, None, library)  # pyright: ignore[reportArgumentType]
    tables = [session.upload(t).buffer for t in (cos, sin, pads)]
    call(on_device.buffer, *tables, 6, 3, 4, 5, 5 * spec.head_dim)
    places = torch.arange(4, 7) - pads[:, None]
    right = reference.rope(spec, x, cos[places], sin[places])
    got = on_device.read().view(2, 3, 5, spec.head_dim).transpose(1, 2)
    return wrong(got, right, TOLERANCE["float32"], "rope")


FORM = device_form(only_float32, lanes_space, lower, bind, verify, "kernels/rope/tvm_opencl.py")
