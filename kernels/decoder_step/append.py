"""Appending one head of keys or values to the blocked cache, as an emitter."""

from __future__ import annotations

from typing import Any

from ..attention.spec import KEY_BLOCK
from ..shared import tir
from ..shared.tir import T


def append_row(
    step: Any, at: dict[str, Any], b: Any, kv_head: Any, position: Any, is_key: Any, source: Any
) -> None:
    """Emit: the `head_dim` floats at qkv[source:] to the cache's slot `position`; int8 gets a scale."""
    spec, k, lanes, d = step.spec, step.kernel, step.isa.lanes, step.spec.head_dim
    factor: Any = None
    if spec.kv_dtype == "int8":
        largest = tir.Register("float32", lanes)
        largest.set(tir.f32(0.0, lanes))
        for i in range(d // lanes):
            largest.set(T.max(largest.get(), T.abs(tir.load(k["qkv"], source + i * lanes, lanes))))
        top = tir.let(tir.reduce_max(largest.get()))
        factor = tir.let(T.Select(top > T.float32(0), T.float32(127) / top, T.float32(0)))
        entry = tir.let(b * k["ks_sb"] + kv_head * k["ks_sh"] + position)
        for name, condition in (("k_scale", is_key), ("v_scale", T.Not(is_key))):
            with tir.when(condition):
                tir.store(tir.buffer_at(at[name], "float32"), entry, top / T.float32(127))

    def place(target: Any, where: Any, i: Any, width: int) -> None:
        value = tir.load(k["qkv"], source + i, width)
        if factor is None:
            tir.from_f32(target, where, value)
        else:
            code = tir.cast(T.nearbyint(value * tir.splat(factor, width)), "int32")
            tir.store(target, where, tir.cast(code, "int8"))

    with tir.when(is_key):
        block = tir.let(T.truncdiv(position, T.int64(KEY_BLOCK)))
        lane = tir.let(T.truncmod(position, T.int64(KEY_BLOCK)))
        start = tir.let(b * k["k_sb"] + kv_head * k["k_sh"] + block * (d * KEY_BLOCK) + lane)
        with tir.loop(d) as i:
            place(tir.buffer_at(at["k"], spec.kv_dtype), start + i * KEY_BLOCK, i, 1)
    with tir.when(T.Not(is_key)):
        start = tir.let(b * k["v_sb"] + kv_head * k["v_sh"] + position * d)
        with tir.loop(d // lanes) as i:
            place(tir.buffer_at(at["v"], spec.kv_dtype), start + i * lanes, i * lanes, lanes)
