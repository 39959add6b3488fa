"""From a loaded library to a callable on torch tensors. Needs no TVM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...compiler.errors import UnsupportedError
from ...compiler.target import Target
from ..shared.scratch import COUNTER_BYTES, scratch
from .areas import decode_area, decode_chunk, partial_bytes, prefill_area
from .spec import KEY_BLOCK, AttentionSpec

__all__ = ["bind", "check", "decode_area", "decode_chunk"]

_NO_WINDOW = 1 << 40
_LOG2_E = 1.4426950408889634


def bind(
    spec: AttentionSpec, configuration: Mapping[str, Any], target: Target, library: Any
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return call(q, k, v, **options) -> (out, lse or None); options as in `reference.attention`."""
    matrix = spec.math == "bfloat16"
    prefill = library.function("prefill")
    decode = prefill if matrix else library.function("decode")
    decode_rows, max_chunk = int(configuration["decode_rows"]), int(configuration["chunk"])
    block_q, block_k = int(configuration["block_q"]), int(configuration["block_k"])
    blocked, scaled = spec.layout == "blocked", spec.kv_dtype == "int8"
    area = decode_area(spec, max_chunk)
    per_thread = prefill_area(spec, str(configuration.get("isa") or target.isa), block_q, block_k)
    out_dtype = getattr(torch, spec.q_dtype)
    hq, d, dv = spec.num_heads, spec.head_dim, spec.v_head_dim

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
            strides = (tq * hq * dv, dv, hq * dv, 1)  # [B, Tq, Hq, Dv] in memory
            out = torch.empty_strided((batch, hq, tq, dv), strides, dtype=out_dtype)
        lse = torch.empty((batch, hq, tq)) if spec.lse else None
        if tq == 0 or batch == 0:
            return out, lse
        threads = torch.get_num_threads()
        few = tq <= decode_rows and not matrix
        chunk = decode_chunk(tk, max_chunk)
        if few:
            nbytes = threads * area + partial_bytes(spec, batch * hq * tq, -(-tk // chunk) + 1)
        else:
            nbytes = threads * per_thread + COUNTER_BYTES
        factor = spec.head_dim**-0.5 if scale is None else scale
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
            factor / softcap if softcap else factor * _LOG2_E,
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

    partial: tuple[int, int, int] = (0, 0, 0)  # of the last context: tk, its chunk, bytes of partial results

    def row(
        threads: int, tk: int, q: int, cache: tuple[int, ...], out: int, scale: float, softcap: float
    ) -> None:
        """One query of one sequence at bare addresses, unchecked; `cache` as `append.addresses` gives it."""
        nonlocal partial
        of, chunk, nbytes = partial
        if of != tk:
            chunk = decode_chunk(tk, max_chunk)
            nbytes = partial_bytes(spec, hq, -(-tk // chunk) + 1)
            partial = (tk, chunk, nbytes)
        decode(
            threads, 1, 1, tk, tk - 1, _NO_WINDOW, chunk,
            scale / softcap if softcap else scale * _LOG2_E, softcap * _LOG2_E,
            q, 0, d, 0, *cache, 0, 0, 0, 0, 0, 0, out, 0, dv, 0, 0, scratch(threads * area + nbytes),
        )  # fmt: skip

    def segment(
        threads: int, tokens: int, places: tuple[int, int, int, int], strides: tuple[int, ...], scale: float
    ) -> None:
        """All queries over all keys of one sequence: q, k, v and out at `places`, unchecked.

        `strides` are those of head and token of q, k, v and out.
        """
        q, k, v, out = places
        q_sh, q_st, k_sh, k_st, v_sh, v_st, o_sh, o_st = strides
        few = tokens <= decode_rows and not matrix
        chunk = decode_chunk(tokens, max_chunk)
        nbytes = threads * per_thread + COUNTER_BYTES
        if few:
            nbytes = threads * area + partial_bytes(spec, hq * tokens, -(-tokens // chunk) + 1)
        (decode if few else prefill)(
            threads, 1, tokens, tokens, 0, _NO_WINDOW, chunk, scale * _LOG2_E, 0.0,
            q, 0, q_sh, q_st, k, 0, k_sh, k_st, v, 0, v_sh, v_st, 0, 0, 0, 0, 0, 0,
            0, 0, 0, 0, 0, 0, out, 0, o_sh, o_st, 0, scratch(nbytes),
        )  # fmt: skip

    bare = spec.mask == "none" and not (spec.sinks or spec.lse or spec.window or scaled)
    strided = bare and spec.layout == "strided" and not spec.softcap
    checked.segment = segment if strided else None  # pyright: ignore[reportFunctionMemberAccess]
    plain = blocked and spec.mask == "none" and not (matrix or spec.sinks or spec.lse or spec.window)
    checked.row = row if plain else None  # pyright: ignore[reportFunctionMemberAccess]
    checked.unchecked = call  # pyright: ignore[reportFunctionMemberAccess]  # for callers that have checked
    return checked


def check(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
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
        inner = (spec.head_dim * KEY_BLOCK, KEY_BLOCK, 1)
        if k.stride()[2:] != inner or v.stride()[2:] != (spec.v_head_dim, 1):
            raise UnsupportedError("a blocked cache must be contiguous within a head")
    tk = v.shape[2] if tk is None else tk
    batch, tq = q.shape[0], q.shape[2]
    _expect("q", q, (batch, spec.num_heads, tq, spec.head_dim), spec.q_dtype)
    _expect("v", v, (batch, spec.num_kv_heads, v.shape[2], spec.v_head_dim), spec.kv_dtype)
    if k.dtype != v.dtype or k.shape[:2] != v.shape[:2] or k.shape[3] != spec.head_dim:
        raise UnsupportedError(f"k {tuple(k.shape)} {k.dtype} does not fit v {tuple(v.shape)} {v.dtype}")
    _check_options(spec, options, batch, tq, tk)
    return q, k, v


def _check_options(spec: AttentionSpec, options: dict[str, Any], batch: int, tq: int, tk: int) -> None:
    """Refuse options that the spec leaves out, or that lack; bring tensors to what the kernels read."""
    for name in ("window", "softcap"):
        value = options.get(name, 0)
        if value < 0 or (value and not getattr(spec, name)):
            raise UnsupportedError(f"{name}={value} does not fit a problem with {name}={getattr(spec, name)}")
    wanted = {
        "lengths": spec.mask == "causal_lengths",
        "prefix": spec.mask == "prefix",
        "bias": spec.mask == "additive",
        "sinks": spec.sinks,
        "k_scale": spec.kv_dtype == "int8",
        "v_scale": spec.kv_dtype == "int8",
    }
    for name, needed in wanted.items():
        x = options.get(name)
        if (x is not None) != needed:
            raise UnsupportedError(f"{spec.key()} {'needs' if needed else 'takes no'} {name}")
        if x is None:
            continue
        if name in ("lengths", "prefix"):
            x = _expect(name, x.to(torch.int32), (batch,), "int32").contiguous()
        elif name == "sinks":
            x = _expect(name, x.float(), (spec.num_heads,), "float32").contiguous()
        elif name == "bias":
            x = _expect(name, x.expand(batch, spec.num_heads, tq, tk), (), spec.bias_dtype)
        else:
            slots = (
                -(-tk // KEY_BLOCK) * KEY_BLOCK if spec.layout == "blocked" else tk
            )  # whole blocks are read
            x = _expect(name, x[:, :, :slots], (batch, spec.num_kv_heads, slots), "float32")
        options[name] = x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _expect(name: str, x: Tensor, shape: tuple[int, ...], dtype: str) -> Tensor:
    """Return x, or raise UnsupportedError when its shape (unless empty) or type differs."""
    if x.dtype != getattr(torch, dtype) or (shape and tuple(x.shape) != shape):
        raise UnsupportedError(f"{name} is {tuple(x.shape)} {x.dtype}, not {shape or ''} {dtype}")
    return x


def _bias(bias: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if bias is None else (bias.data_ptr(), *bias.stride()[:3])
