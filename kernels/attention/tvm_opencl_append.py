"""Appending to the `vectors` cache on a device: a work-item stores 16 bytes of a key and of a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...compiler.operator import Configuration, Declined
from ...compiler.target import Target
from ..shared.device_check import random_tensors, wrong
from ..shared.device_form import device_form, lanes_space, only_float32
from .append_spec import AppendSpec
from .vectors import KEYS, dense_keys, elements, slots_of, torch_dtype

_TOLERANCE = {"float32": 0.0, "bfloat16": 0.0, "float16": 0.0, "int8": 0.01}  # a code may round the other way


def decide(spec: AppendSpec, target: Target) -> Declined | None:
    """Decline heads that are not whole vectors."""
    if spec.head_dim != spec.v_head_dim or spec.head_dim % elements(spec.kv_dtype):
        return Declined(
            f"head sizes {spec.head_dim} and {spec.v_head_dim}: equal ones of whole vectors of 16 bytes"
        )
    return only_float32(spec, target)


def lower(spec: AppendSpec, configuration: Configuration, target: Target) -> list[Any]:
    """Return the kernel `append`: grid (heads * vectors of one / lanes, rows)."""
    from ..shared import device_tir as d

    numbers = ("tokens", "position", "heads", "slots", "k_st", "v_st", "k_first", "v_first")
    args = [
        ("k_in", "*float32x4"),
        ("v_in", "*float32x4"),
        ("k", "*uint32x4"),
        ("v", "*uint32x4"),
        ("k_scale", "*float32"),
    ]
    args += [("v_scale", "*float32"), *((n, "int32") for n in numbers)]
    k = d.DeviceKernel("append", args, int(configuration["lanes"]))
    e = elements(spec.kv_dtype)
    chunks, quads = spec.head_dim // e, e // 4
    item, row = d.let(k.group[0] * k.lanes + k.lane), k.group[1]
    with d.when(item < k["heads"] * chunks):
        head, chunk = d.let(d.divide(item, chunks)), d.let(d.remainder(item, chunks))
        sequence = d.let(d.truncated_division(row, k["tokens"]))
        slot = k["position"] + (row - sequence * k["tokens"])
        place = d.let((sequence * k["heads"] + head) * k["slots"] + slot)
        targets = {
            "k": d.divide(place, KEYS) * (chunks * KEYS) + chunk * KEYS + d.remainder(place, KEYS),
            "v": place * chunks + chunk,
        }
        for name, at in targets.items():
            start = d.let(row * k[f"{name}_st"] + k[f"{name}_first"] + head * (spec.head_dim // 4))
            factor = None
            if spec.kv_dtype == "int8":
                factor = _absmax(
                    d, k[f"{name}_in"], start, spec.head_dim // 4, k[f"{name}_scale"], place, chunk
                )
            values = []
            for i in range(quads):
                four = d.let(k[f"{name}_in"][start + chunk * quads + i])
                values += [d.let(d.lane_of(four, j)) for j in range(4)]
            d.store(k[name], d.let(at), d.vector(_words(d, spec.kv_dtype, values, factor)))
    return [k.finish()]


def _absmax(d: Any, x: Any, start: Any, quads: int, scales: Any, place: Any, chunk: Any) -> Any:
    """Store the head's scale, and return 127 / absmax (0 for a head of zeros or with NaN or Inf)."""
    largest, check = d.Register("float32", d.f32(0.0)), d.Register("float32", d.f32(0.0))
    with d.loop(quads) as i:
        four = d.let(x[start + i])
        for j in range(4):
            value = d.let(d.lane_of(four, j))
            largest.set(d.maximum(largest.get(), d.maximum(value, d.f32(0.0) - value)))
            check.add(value * d.f32(0.0))  # NaN when the value is not finite
    scale = d.let(largest.get() / d.f32(127.0) + check.get())
    with d.when(chunk == 0):
        d.store(scales, place, scale)
    usable = d.both(largest.get() > 0.0, check.get() == 0.0)
    return d.let(d.choose(usable, d.f32(127.0) / largest.get(), d.f32(0.0)))


def _words(d: Any, kv_dtype: str, values: list[Any], factor: Any) -> list[Any]:
    """Return the four words that hold the values."""
    if kv_dtype == "float32":
        return [d.as_bits(v, "uint32") for v in values]
    if kv_dtype == "int8":
        zero = d.f32(0.0)
        codes = [d.choose(factor > zero, d.round_even(v * factor), zero) for v in values]
        bytes_ = [d.mask(d.as_bits(d.cast(c, "int32"), "uint32"), 8) for c in codes]
        return [_joined(d, bytes_[i : i + 4], 8) for i in range(0, 16, 4)]
    convert = d.to_half if kv_dtype == "float16" else d.to_bfloat16
    parts = [d.let(convert(v)) for v in values]
    return [_joined(d, parts[i : i + 2], 16) for i in range(0, 8, 2)]


def _joined(d: Any, parts: list[Any], bits: int) -> Any:
    word = parts[0]
    for i, part in enumerate(parts[1:], 1):
        word = d.either(word, d.shift_left(part, bits * i))
    return word


def bind(spec: AppendSpec, configuration: Configuration, target: Target, library: Any) -> Callable[..., None]:
    """Return `call(keys, values, k, v, k_scale, v_scale, rows, tokens, position, heads, slots)` over buffers.

    keys and values are (fp32 buffer, row stride, first element): the heads of row sequence * tokens + token.
    """
    kernel, lanes = library.function("append"), int(configuration["lanes"])
    chunks = spec.head_dim // elements(spec.kv_dtype)

    def call(
        keys: tuple[Any, int, int], values: tuple[Any, int, int], k: Any, v: Any, k_scale: Any, v_scale: Any,
        rows: int, tokens: int, position: int, heads: int, slots: int,
    ) -> None:  # fmt: skip
        kernel(
            (-(-heads * chunks // lanes), rows), k_in=keys[0], v_in=values[0], k=k, v=v, k_scale=k_scale,
            v_scale=v_scale, tokens=tokens, position=position, heads=heads, slots=slots, k_st=keys[1] // 4,
            v_st=values[1] // 4, k_first=keys[2] // 4, v_first=values[2] // 4,
        )  # fmt: skip

    return call


def verify(spec: AppendSpec, configuration: Configuration, session: Any, library: Any) -> str:
    """Append 2 x 3 tokens of 3 heads from slot 30 on, over a block's end."""
    from .append import quantize

    heads, dim, tokens, position, slots = 3, spec.head_dim, 3, 30, slots_of(33)
    (x,) = random_tensors(5, (2, tokens, 2, heads, dim))
    dtype = torch_dtype(spec.kv_dtype)
    e = elements(spec.kv_dtype)
    k = session.upload(torch.zeros(2, heads, slots // KEYS, dim // e, KEYS, e, dtype=dtype))
    v = session.upload(torch.zeros(2, heads, slots, dim, dtype=dtype))
    scales = [session.upload(torch.full((2, heads, slots), torch.nan)) for _ in range(2)]
    call = bind(spec, configuration, None, library)  # pyright: ignore[reportArgumentType]
    given, row = session.upload(x).buffer, 2 * heads * dim
    buffers = [t.buffer for t in (k, v, *scales)]
    call((given, row, 0), (given, row, heads * dim), *buffers, 2 * tokens, tokens, position, heads, slots)
    held = slice(position, position + tokens)
    for name, got, part in (("keys", dense_keys(k.read()), 0), ("values", v.read(), 1)):
        wanted, got = x[:, :, part].transpose(1, 2), got[:, :, held].float()
        if spec.kv_dtype == "int8":
            wanted, factors = quantize(wanted)
            if problem := wrong(scales[part].read()[:, :, held], factors, 1e-6, f"the scales of {name}"):
                return problem
        else:
            wanted = wanted.to(dtype).float()
        if problem := wrong(got, wanted, _TOLERANCE[spec.kv_dtype], f"appending {name}"):
            return problem
    return ""


FORM = device_form(
    decide, lanes_space, lower, bind, verify, "kernels/attention/tvm_opencl_append.py",
    "kernels/attention/vectors.py",
)  # fmt: skip
