"""What the tuner has to know of the CPU form: phases, inputs to time, checks against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...compiler.operator import Sizes, Tuning
from ...compiler.target import Target
from ..shared.trial import Copies, results
from .append import addresses, quantize
from .reference import attention as reference
from .space import DECODE, FEW, PREFILL
from .spec import KEY_BLOCK, AttentionSpec, causal_pairs

_FEWEST, _MOST = 4, 16  # queries up to which every configuration runs decode, and above which none does
_MOST_SCORES = 6 << 20  # of a check: the reference holds them in fp64


def phase(spec: AttentionSpec, sizes: Sizes) -> str:
    """Return which of the form's functions runs."""
    if spec.math == "bfloat16" or sizes["tq"] > _MOST:
        return PREFILL
    return DECODE if sizes["tq"] <= _FEWEST else FEW


def family(spec: AttentionSpec, target: Target) -> tuple[str, dict[str, int]]:
    """Return types, mask and layout; heads and their sizes are sizes."""
    text = spec.key().split(" ", 1)[1]
    heads = {"heads": spec.num_heads, "kv_heads": spec.num_kv_heads}
    return text, heads | {"head_dim": spec.head_dim, "v_head_dim": spec.v_head_dim}


def functions(spec: AttentionSpec, which: str) -> tuple[str, ...]:
    """Return the native functions that a phase may call."""
    return {DECODE: ("decode",), FEW: ("decode", "prefill"), PREFILL: ("prefill",)}[which]


def check(spec: AttentionSpec, sizes: Sizes, target: Target, call: Callable[..., Any], seed: int) -> str:
    """Return what is wrong with `call` around these sizes: the edges of their buckets and odd ones."""
    for tq, tk in _edges(spec, sizes, seed):
        if problem := _wrong(spec, tq, tk, call, seed):
            return f"{tq} queries, {tk} keys, seed {seed}: {problem}"
    return ""


def _wrong(spec: AttentionSpec, tq: int, tk: int, call: Callable[..., Any], seed: int) -> str:
    q, k, v, options = inputs(spec, tq, tk, seed)
    want = reference(spec, q, k, v, **options)

    def attend() -> Any:
        shape = (1, tq, spec.num_heads, spec.v_head_dim)
        out = torch.full(shape, torch.nan, dtype=q.dtype).transpose(1, 2)
        return call(q, k, v, out=out, **options)

    return next(filter(None, (_difference(spec, got, want) for got in results(attend))), "")


def _difference(spec: AttentionSpec, got: Any, want: Any) -> str:
    """Return what is wrong with (results, logarithms of sums) beside what they should be."""
    for a, b, most in zip(got, want, (spec.tolerance, max(spec.tolerance, 2e-4))):
        if a is None:
            continue
        if not torch.isfinite(a[torch.isfinite(b)]).all():
            return "not every result was written with a number"
        a, b = a.double(), b.double()
        finite = torch.isfinite(b)
        error = float((a - b)[finite].norm() / b[finite].norm().clamp_min(1e-30))
        if not error <= most:
            return f"relative error {error:.1e}"
    return ""


def _edges(spec: AttentionSpec, sizes: Sizes, seed: int) -> list[tuple[int, int]]:
    """Return (queries, keys) to check: as large as the reference can hold, each seed others."""
    which, low = phase(spec, sizes), 1 << sizes["tq"].bit_length() - 1
    queries = ((low, 2 * low), (2 * low - 1,), (low + low // 3 * 2 | 1,))[seed % 3]
    least, most = {DECODE: (1, _FEWEST), FEW: (_FEWEST + 1, _MOST), PREFILL: (1, 1 << 30)}[which]
    if which == PREFILL and spec.math != "bfloat16":
        least = _MOST + 1
    keys = (sizes["tk"], 2 * sizes["tk"], sizes["tk"] + 13)[seed % 3]
    found = []
    for tq in sorted({min(max(n, least), most) for n in queries}):
        tq = min(tq, 700)
        tk = min(keys, _MOST_SCORES // (spec.num_heads * tq))
        found.append((tq, max(tk, tq)))
    return found


def inputs(spec: AttentionSpec, tq: int, tk: int, seed: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Return random q, k, v of one sequence in the spec's types and layout, and the options."""
    generator = torch.Generator().manual_seed(1000 * tk + 10 * tq + seed)
    options: dict[str, Any] = {"tk": tk}
    slots = -(-tk // KEY_BLOCK) * KEY_BLOCK if spec.layout == "blocked" else tk
    tensors = []
    for name, dim in (("k", spec.head_dim), ("v", spec.v_head_dim)):
        x = torch.randn(1, spec.num_kv_heads, slots, dim, generator=generator)
        if spec.kv_dtype == "int8":
            x, options[f"{name}_scale"] = quantize(x)
        tensors.append(x.to(getattr(torch, spec.kv_dtype)))
    k, v = tensors
    if spec.layout == "blocked":
        k = k.view(1, spec.num_kv_heads, slots // KEY_BLOCK, KEY_BLOCK, spec.head_dim)
        k = k.transpose(3, 4).contiguous()
    q = torch.randn(1, tq, spec.num_heads, spec.head_dim, generator=generator).transpose(1, 2)
    if spec.mask == "causal_lengths":
        options["lengths"] = torch.tensor([tk], dtype=torch.int32)
    if spec.mask == "prefix":
        options["prefix"] = torch.tensor([tk // 2], dtype=torch.int32)
    if spec.mask == "additive":
        options["bias"] = torch.randn(1, 1, tq, tk, generator=generator).to(getattr(torch, spec.bias_dtype))
    if spec.sinks:
        options["sinks"] = torch.randn(spec.num_heads, generator=generator)
    if spec.window:
        options["window"] = max(1, tk // 2)
    if spec.softcap:
        options["softcap"] = 30.0
    return q.to(getattr(torch, spec.q_dtype)), k, v, options


class Workload:
    """One attention over `copies` of its keys and values: each call reads some that no cache holds."""

    def __init__(self, spec: AttentionSpec, sizes: Sizes, target: Target, cache_bytes: int) -> None:
        tq, tk = sizes["tq"], sizes["tk"]
        self._q, k, v, self._options = inputs(spec, tq, tk, 0)
        shapes = [(x.shape, x.dtype) for x in (k, v)]
        held = [x.contiguous().view(-1).view(torch.uint8) for x in (k, v)]
        starts = [0, -(-held[0].numel() // 64) * 64]
        copies = Copies(starts[1] + held[1].numel(), cache_bytes)
        self._kv = []
        for i in range(copies.count):
            pair = []
            for start, data, (shape, dtype) in zip(starts, held, shapes):
                piece = copies.view(i)[start : start + data.numel()]
                piece.copy_(data)
                pair.append(piece.view(dtype).view(shape))
            self._kv.append(pair)
        scales = self._options.get("k_scale"), self._options.get("v_scale")
        self._places = [addresses(k, v, *scales) for k, v in self._kv] if spec.layout == "blocked" else []
        self._tk, self._out = tk, torch.empty_like(self._q[:, :, :1])
        self._row = (spec.head_dim**-0.5, self._options.get("softcap", 0.0)) if tq == 1 else None
        self.copies, self.area = copies.count, copies.area
        self.nbytes = spec.kv_bytes(tk) + 2 * self._q.numel() * self._q.element_size()
        pairs = tq * tk if spec.mask in ("none", "additive") else causal_pairs(tq, tk)
        self.operations = spec.operations(pairs)
        self.arithmetic = "bfloat16" if spec.math == "bfloat16" else "float"

    def run(self, call: Callable[..., Any], index: int) -> Any:
        """Attend to copy `index` of the keys and values; one query as a decode step does, at addresses."""
        row = getattr(call, "row", None)
        if row is not None and self._row is not None:
            q, out = self._q.data_ptr(), self._out.data_ptr()
            return row(
                torch.get_num_threads(), self._tk, q, self._places[index % self.copies], out, *self._row
            )
        k, v = self._kv[index % self.copies]
        return call(self._q, k, v, **self._options)


TUNING = Tuning(phase, family, functions, Workload, check)
