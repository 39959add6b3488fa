"""Appending keys and values to the blocked cache on a CPU: transposed into blocks, quantised for int8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...compiler.target import Target
from ..shared import tir
from ..shared.isa.table import by_name
from ..shared.tir import T
from .append_spec import AppendSpec
from .spec import KEY_BLOCK
from .tvm_math import Registers
from .tvm_problem import quotient, remainder

ARGUMENTS = (
    *("batch", "heads", "tokens", "position"),
    *("k", "k_sb", "k_sh", "k_st", "v", "v_sb", "v_sh", "v_st"),
    *("k_cache", "kc_sb", "kc_sh", "v_cache", "vc_sb", "vc_sh", "k_scale", "v_scale", "s_sb", "s_sh"),
)


def lower(spec: AppendSpec, configuration: Mapping[str, Any], target: Target) -> list[Any]:
    """Return the PrimFuncs `append` (one thread) and `append_parallel` (over heads)."""
    lanes = by_name(str(configuration.get("isa") or target.isa)).lanes
    functions = []
    for name, rows in (("append", tir.loop), ("append_parallel", tir.parallel)):
        special = {"k": spec.dtype, "v": spec.dtype, "k_cache": spec.kv_dtype, "v_cache": spec.kv_dtype}
        special |= {"k_scale": "float32", "v_scale": "float32"}
        kernel = tir.Kernel(name, [(a, "*" + special[a] if a in special else "int64") for a in ARGUMENTS])
        with rows(kernel["batch"] * kernel["heads"]) as row:
            emit_append(spec, lanes, kernel, row)
        functions.append(kernel.finish())
    return functions


def emit_append(spec: AppendSpec, lanes: int, a: Any, row: Any) -> None:
    """Emit: all new tokens of one (sequence, KV head); `a` maps ARGUMENTS to expressions."""
    b, h = tir.let(quotient(row, a["heads"])), tir.let(remainder(row, a["heads"]))
    with tir.loop(a["tokens"]) as t:
        slot = tir.let(a["position"] + t)
        block = tir.let(quotient(slot, T.int64(KEY_BLOCK)))
        scale_at = tir.let(b * a["s_sb"] + h * a["s_sh"] + slot)
        source = tir.let(b * a["k_sb"] + h * a["k_sh"] + t * a["k_st"])
        base = b * a["kc_sb"] + h * a["kc_sh"]
        target = tir.let(base + block * (spec.head_dim * KEY_BLOCK) + remainder(slot, T.int64(KEY_BLOCK)))
        factor = _scale(spec, lanes, a["k"], source, spec.head_dim, a["k_scale"], scale_at)
        with tir.loop(spec.head_dim // lanes) as i:
            held = tir.local("float32", lanes)
            tir.store(held, 0, tir.to_f32(a["k"], source + i * lanes, lanes))
            for e in range(lanes):
                _put(spec, a["k_cache"], target + (i * lanes + e) * KEY_BLOCK, tir.load(held, e), factor, 1)
        source = tir.let(b * a["v_sb"] + h * a["v_sh"] + t * a["v_st"])
        target = tir.let(b * a["vc_sb"] + h * a["vc_sh"] + slot * spec.v_head_dim)
        factor = _scale(spec, lanes, a["v"], source, spec.v_head_dim, a["v_scale"], scale_at)
        with tir.loop(spec.v_head_dim // lanes) as i:
            value = tir.to_f32(a["v"], source + i * lanes, lanes)
            _put(spec, a["v_cache"], target + i * lanes, value, factor, lanes)


def _scale(spec: AppendSpec, lanes: int, x: Any, at: Any, size: int, scales: Any, scale_at: Any) -> Any:
    """Store absmax / 127 of a token (NaN when it holds NaN or Inf); return 127 / absmax, None for floats."""
    if spec.kv_dtype != "int8":
        return None
    most, poison = Registers(1, lanes), Registers(1, lanes)
    most[0] = tir.f32(0.0, lanes)
    poison[0] = tir.f32(0.0, lanes)
    with tir.loop(size // lanes) as i:
        value = tir.to_f32(x, at + i * lanes, lanes)
        most[0] = T.max(most[0], T.abs(value))
        poison[0] = poison[0] + value * tir.f32(0.0, lanes)
    result = Registers(2, 1)
    result[0] = tir.reduce_max(most[0])
    tir.store(scales, scale_at, result[0] / T.float32(127) + tir.reduce_add(poison[0]))
    result[1] = T.Select(result[0] > T.float32(0), T.float32(127) / result[0], T.float32(0))
    return result


def _put(spec: AppendSpec, cache: Any, at: Any, value: Any, factor: Any, lanes: int) -> None:
    if factor is None:
        tir.from_f32(cache, at, value)
        return
    code = Registers(1, lanes)
    code[0] = T.nearbyint(value * tir.splat(factor[1], lanes))
    limit, low = tir.f32(127.0, lanes), tir.f32(-127.0, lanes)
    code[0] = T.Select(code[0] > low, code[0], low)  # a NaN becomes -127: converting it is undefined
    code[0] = T.Select(code[0] < limit, code[0], limit)
    tir.store(cache, at, tir.cast(tir.cast(code[0], "int32"), "int8"))
