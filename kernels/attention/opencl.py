"""Attention's OpenCL form: what it takes, how it is launched and how a device is verified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...compiler.backends.opencl_device import class_of
from ...compiler.operator import Configuration, Declined
from ...compiler.target import Target
from ..shared.device_check import random_tensors, wrong
from ..shared.device_form import device_form
from .reference import attention
from .spec import AttentionSpec
from .vectors import elements, lay_keys, slots_of, torch_dtype


def decide(spec: AttentionSpec, target: Target) -> Declined | None:
    """Accept causal attention over a cache in the `vectors` layout."""
    if spec.layout != "vectors" or spec.mask != "causal_lengths":
        return Declined(
            f"OpenCL kernels read the `vectors` cache with causal lengths, not {spec.layout} {spec.mask}"
        )
    if spec.q_dtype != "float32" or spec.math != "float32" or spec.sinks or spec.lse:
        return Declined("OpenCL attention has float32 queries and math, no sinks and no lse")
    if spec.head_dim != spec.v_head_dim or spec.head_dim % elements(spec.kv_dtype) or spec.head_dim > 256:
        return Declined(
            f"head sizes {spec.head_dim} and {spec.v_head_dim}: equal ones of whole vectors, at most 256"
        )
    if not space(spec, target):
        return Declined(f"heads of {spec.head_dim} need more local memory than {target.name} has")
    return None


def space(spec: AttentionSpec, target: Target) -> list[dict[str, Any]]:
    """Return the work-groups that fit the class and have a lane for each vector of a head."""
    work_group, local, _ = class_of(target)
    chunks = spec.head_dim // elements(spec.kv_dtype)
    return [
        {"lanes": n} for n in (64, 128, 256) if chunks <= n <= work_group and _local_bytes(spec, n) <= local
    ]


def _local_bytes(spec: AttentionSpec, lanes: int) -> int:
    """Return the local memory of the largest kernel: queries, weights, and a vector a lane."""
    return 4 * rows_of(spec) * (spec.head_dim + lanes) + 16 * lanes


def heads_of(spec: AttentionSpec) -> int:
    """Query heads of one work-group: a divisor of the group, as many as registers hold."""
    return max(n for n in range(1, most_rows(spec) + 1) if spec.group % n == 0)


def most_rows(spec: AttentionSpec) -> int:
    """Rows whose sums a work-item keeps: 48 elements in all, and 4 KiB of queries."""
    return max(1, min(8, 48 // elements(spec.kv_dtype), 1024 // spec.head_dim))


def queries_of(spec: AttentionSpec) -> int:
    """Queries of one work-group in prefill."""
    return max(1, most_rows(spec) // heads_of(spec))


def rows_of(spec: AttentionSpec) -> int:
    """Rows of one work-group in prefill."""
    return heads_of(spec) * queries_of(spec)


KEYS_A_SPLIT = 256  # a work-group with fewer keys would spend its time on starting and on the sum
_WAVES = 4  # work-groups a compute unit needs to hide the memory's latency


def splits_of(spec: AttentionSpec, units: int, batch: int, keys: int) -> int:
    """Return how many work-groups share one query's keys, so that each of the device's units has some."""
    groups = batch * spec.num_heads // heads_of(spec)
    return max(1, min(-(-_WAVES * units // groups), keys // KEYS_A_SPLIT))


def parts_shape(spec: AttentionSpec, batch: int, splits: int) -> tuple[int, int, int]:
    """Return the shape of the buffer `parts` (fp32) that a call with so many splits needs."""
    return batch * spec.num_heads, splits, spec.head_dim + 4


def lower(spec: AttentionSpec, configuration: Configuration, target: Target) -> list[Any]:
    """Return the kernels."""
    from .tvm_opencl import lower as emit

    return emit(spec, configuration, target)


def bind(
    spec: AttentionSpec, configuration: Configuration, target: Target, library: Any
) -> Callable[..., None]:
    """Return `call(q, k, v, k_scale, v_scale, pads, out, batch, tokens, position, q_st, slots, ...)`.

    With `splits` over 1 so many work-groups share the keys of one query, and `parts` takes their sums.

    q fp32: token t of sequence b at (b * tokens + t) * q_st, heads side by side; k and v of `slots` slots a
    sequence and head; pads int32 [batch] slots at the left that hold nothing; out fp32 [batch * tokens,
    Hq * D]; all are cl buffers.
    Also `window`, `scale` and `softcap` where the spec has them.
    """
    decode, prefill = library.function("decode"), library.function("prefill")
    split, combine = library.function("split"), library.function("combine")
    lanes, quads = int(configuration["lanes"]), spec.head_dim // 4
    groups, queries = spec.num_heads // heads_of(spec), queries_of(spec)

    def call(
        q: Any, k: Any, v: Any, k_scale: Any, v_scale: Any, pads: Any, out: Any, batch: int, tokens: int,
        position: int, q_st: int, slots: int, window: int = 0, scale: float | None = None,
        softcap: float = 0.0, splits: int = 1, parts: Any = None,
    ) -> None:  # fmt: skip
        common = {
            "q": q, "k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale, "pads": pads, "tokens": tokens,
            "position": position, "q_st": q_st, "slots": slots, "window": window, "softcap": softcap,
            "scale": spec.head_dim**-0.5 if scale is None else scale,
        }  # fmt: skip
        if tokens > 1:
            prefill((-(-tokens // queries), groups * batch), out=out, **common)
        elif splits == 1:
            decode((1, groups * batch), out=out, **common)
        else:
            seen = min(position + 1, window + lanes) if spec.window else position + 1
            each = -(-seen // (lanes * splits))
            split((splits, groups * batch), out=parts, splits=splits, tiles_each=each, **common)
            count = batch * spec.num_heads * quads
            grid = (-(-count // lanes), 1)
            combine(grid, parts=parts, numbers=parts, out=out, count=count, splits=splits)

    return call


def run(
    spec: AttentionSpec, session: Any, call: Callable[..., None], tokens: int, position: int, seed: int = 0,
    splits: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return (what the device computes, the reference) for two sequences, the second padded on the left.

    Slots that no query sees hold NaN, and so does the output before.
    """
    tk, slots = position + tokens, slots_of(position + tokens + 1)
    heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    q, k, v, scales = random_tensors(
        seed,
        (2, tokens, heads, dim),
        (2, kv_heads, slots, dim),
        (2, kv_heads, slots, dim),
        (2, 2, kv_heads, slots),
    )
    pads = torch.tensor([0, min(3, tk - 1)], dtype=torch.int32)
    options: dict[str, Any] = {"window": 7} if spec.window else {}
    options |= {"softcap": 2.5} if spec.softcap else {}
    if spec.kv_dtype == "int8":
        k, v = (t.mul(40).round().clamp(-127, 127).to(torch.int8) for t in (k, v))
        scales = scales.abs() / 40 + 0.01
        scales[..., tk:] = torch.nan
        options |= {"k_scale": scales[0], "v_scale": scales[1]}
    else:
        k, v = (t.to(torch_dtype(spec.kv_dtype)) for t in (k, v))
        k[:, :, tk:] = v[:, :, tk:] = torch.nan
    given = [session.upload(t).buffer for t in (q, lay_keys(k, spec.kv_dtype), v, *scales, pads)]
    out = session.upload(torch.full((2, tokens, heads, dim), torch.nan))
    numbers = {name: value for name, value in options.items() if not name.endswith("scale")}
    parts = session.upload(torch.full(parts_shape(spec, 2, splits), torch.nan))
    numbers |= {"splits": splits, "parts": parts.buffer}
    call(*given, out.buffer, 2, tokens, position, heads * dim, slots, **numbers)
    right, _ = attention(
        spec, q.transpose(1, 2), lay_keys(k, spec.kv_dtype), v, tk=tk, lengths=tk - pads, **options
    )
    return out.read().transpose(1, 2), right


def verify(spec: AttentionSpec, configuration: Configuration, session: Any, library: Any) -> str:
    """Compare decode, with its keys in one part and in several, and prefill with the reference."""
    call = bind(spec, configuration, None, library)  # pyright: ignore[reportArgumentType]
    cases = ((1, 0, 1), (1, 150, 1), (1, 150, 3), (1, 716, 2), (1, 716, 5), (9, 0, 1), (5, 70, 1))
    for tokens, position, splits in cases:
        got, right = run(spec, session, call, tokens, position, splits=splits)
        what = f"attention of {tokens} queries at {position}, keys in {splits} parts,"
        if problem := wrong(got, right, 1e-5, what):
            return problem
    return ""


FORM = device_form(
    decide, space, lower, bind, verify, "kernels/attention/tvm_opencl.py", "kernels/attention/opencl.py",
    "kernels/attention/vectors.py",
)  # fmt: skip
