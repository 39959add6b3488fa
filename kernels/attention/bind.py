"""From a loaded library to a callable on torch tensors. Needs no TVM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...compiler.errors import UnsupportedError
from ...compiler.target import Target
from ..shared.scratch import scratch
from .spec import KEY_BLOCK, AttentionSpec

_NO_WINDOW = 1 << 40
_LOG2_E = 1.4426950408889634
_LANES = {"avx512_vnni": (16, 12), "avx2": (8, 6), "portable": (4, 4), "portable16": (16, 12)}


def bind(
    spec: AttentionSpec, configuration: Mapping[str, Any], target: Target, library: Any
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return call(q, k, v, **options) -> (out, lse or None); options as in `reference.attention`."""
    decode, prefill = library.function("decode"), library.function("prefill")
    decode_rows, max_chunk = int(configuration["decode_rows"]), int(configuration["chunk"])
    block_q, block_k = int(configuration["block_q"]), -(-int(configuration["block_k"]) // 32) * 32
    step = _LANES[str(configuration.get("isa") or target.isa)][1]
    blocked, scaled = spec.layout == "blocked", spec.kv_dtype == "int8"
    partial_area, prefill_area = decode_area(spec, max_chunk), _prefill_area(spec, step, block_q, block_k)
    out_dtype = getattr(torch, spec.q_dtype)
    hq, dv = spec.num_heads, spec.v_head_dim

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        tk: int | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        lengths: Tensor | None = None,
        prefix: Tensor | None = None,
        bias: Tensor | None = None,
        sinks: Tensor | None = None,
        window: int = 0,
        softcap: float = 0.0,
        scale: float | None = None,
        q_offset: int | None = None,
        out: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        batch, _, tq, _ = q.shape
        if tk is None:
            tk = v.shape[2]
        if out is None:
            out = torch.empty((batch, tq, hq, dv), dtype=out_dtype).transpose(1, 2)
        lse = torch.empty((batch, hq, tq)) if spec.lse else None
        if tq == 0 or batch == 0:
            return out, lse
        threads = torch.get_num_threads()
        few = tq <= decode_rows
        chunk = decode_chunk(tk, max_chunk)
        if few:
            rows = batch * hq * tq
            nbytes = threads * partial_area + 4 * rows * (-(-tk // chunk) + 1) * (dv + 2) + 192
        else:
            nbytes = threads * prefill_area
        scale = spec.head_dim**-0.5 if scale is None else scale
        limits = lengths if lengths is not None else prefix
        q_sb, q_sh, q_st, _ = q.stride()
        if blocked:
            k_sb, k_sh = k.stride()[:2]
            k_st = KEY_BLOCK
        else:
            k_sb, k_sh, k_st, _ = k.stride()
        v_sb, v_sh, v_st, _ = v.stride()
        o_sb, o_sh, o_st, _ = out.stride()
        ks = (k_scale.data_ptr(), *k_scale.stride()[:2]) if scaled and k_scale is not None else (0, 0, 0)
        vs = (v_scale.data_ptr(), *v_scale.stride()[:2]) if scaled and v_scale is not None else (0, 0, 0)
        (decode if few else prefill)(
            threads, batch, tq, tk,
            tk - tq if q_offset is None else q_offset,
            window if window else _NO_WINDOW,
            chunk,
            scale / softcap if softcap else scale * _LOG2_E,
            softcap * _LOG2_E,
            q.data_ptr(), q_sb, q_sh, q_st,
            k.data_ptr(), k_sb, k_sh, k_st,
            v.data_ptr(), v_sb, v_sh, v_st,
            *ks, *vs,
            0 if limits is None else limits.data_ptr(),
            *_bias(bias),
            0 if sinks is None else sinks.data_ptr(),
            out.data_ptr(), o_sb, o_sh, o_st,
            0 if lse is None else lse.data_ptr(),
            scratch(nbytes),
        )  # fmt: skip
        return out, lse

    def checked(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        return call(*check(spec, q, k, v, options), **options)

    return checked


def decode_chunk(tk: int, most: int) -> int:
    """Return the keys of a chunk: it depends on the context alone, so results do not change with threads."""
    for limit, chunk in ((512, 64), (2048, 128)):
        if tk <= limit:
            return min(chunk, most)
    return most


def check(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Raise UnsupportedError for what the kernels cannot read; make contiguous what they need so."""
    tk = options.get("tk")
    if spec.layout == "strided":
        q, k, v = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (q, k, v))
        keys = v.shape[2]
        if k.shape[2] != keys or (tk is not None and tk > keys):
            raise UnsupportedError(f"k has {k.shape[2]} keys, v {keys}, and {tk} are asked for")
    else:
        q = q if q.stride(-1) == 1 else q.contiguous()
        if tk is None or tk > v.shape[2] or k.shape[2] * KEY_BLOCK < tk:
            raise UnsupportedError(f"tk={tk} does not fit a cache of {v.shape[2]} tokens")
        if not (k[0, 0].is_contiguous() and v[0, 0].is_contiguous()):
            raise UnsupportedError("a blocked cache must be contiguous within a head")
    tk = v.shape[2] if tk is None else tk
    batch, tq = q.shape[0], q.shape[2]
    expected = {
        "q": (q, (batch, spec.num_heads, tq, spec.head_dim), spec.q_dtype),
        "v": (v, (batch, spec.num_kv_heads, v.shape[2], spec.v_head_dim), spec.kv_dtype),
    }
    for name, (x, shape, dtype) in expected.items():
        if tuple(x.shape) != shape or x.dtype != getattr(torch, dtype):
            raise UnsupportedError(f"{name} is {tuple(x.shape)} {x.dtype}, not {shape} {dtype}")
    if k.dtype != v.dtype or k.shape[:2] != v.shape[:2] or (k.shape[3] != spec.head_dim):
        raise UnsupportedError(f"k is {tuple(k.shape)} {k.dtype}, which does not fit v {tuple(v.shape)} {v.dtype}")
    for name in ("lengths", "prefix"):
        wanted = spec.mask == {"lengths": "causal_lengths", "prefix": "prefix"}[name]
        x = options.get(name)
        if not wanted:
            options[name] = None
        elif x is None or x.shape != (batch,):
            raise UnsupportedError(f"mask {spec.mask!r} needs {name} of shape ({batch},)")
        else:
            options[name] = x.to(torch.int32).contiguous()
    if spec.mask == "additive":
        bias = options.get("bias")
        if bias is None:
            raise UnsupportedError("mask 'additive' needs a bias")
        bias = bias.expand(batch, spec.num_heads, tq, tk)
        options["bias"] = bias if tk <= 1 or bias.stride(3) == 1 else bias.contiguous()
    if spec.sinks:
        sinks = options.get("sinks")
        if sinks is None or sinks.shape != (spec.num_heads,):
            raise UnsupportedError(f"sinks must have shape ({spec.num_heads},)")
        options["sinks"] = sinks.float().contiguous()
    if spec.kv_dtype == "int8":
        for name in ("k_scale", "v_scale"):
            x = options.get(name)
            if x is None or x.dtype != torch.float32 or x.dim() != 3 or x.shape[2] < tk:
                raise UnsupportedError(f"int8 keys and values need {name}: float32 [B, Hkv, Tk]")
            options[name] = x if x.stride(2) == 1 else x.contiguous()
    return q, k, v


def _bias(bias: Tensor | None) -> tuple[int, int, int, int]:
    return (0, 0, 0, 0) if bias is None else (bias.data_ptr(), *bias.stride()[:3])


def _line(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def decode_area(spec: AttentionSpec, max_chunk: int) -> int:
    bias = max_chunk if spec.mask == "additive" else 0
    scales = 2 * max_chunk if spec.kv_dtype == "int8" else 0
    parts = (spec.group * spec.head_dim, spec.group * max_chunk, spec.group * spec.v_head_dim, bias, scales)
    return sum(_line(4 * n) for n in parts)


def _prefill_area(spec: AttentionSpec, step: int, block_q: int, block_k: int) -> int:
    rows = -(-max(block_q, spec.group) // step) * step + step
    bias = step * block_k if spec.mask == "additive" else 0
    parts = (rows * spec.head_dim, rows * spec.v_head_dim, rows, rows, block_k * spec.head_dim,
             block_k * spec.v_head_dim, step * block_k, bias, 2 * step, step)  # fmt: skip
    return sum(_line(4 * n) for n in parts)
