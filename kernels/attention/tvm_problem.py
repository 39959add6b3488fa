"""What the attention emitters share: the run-time arguments, which keys a query sees, loads by layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from ..shared import tir
from ..shared.isa.table import Isa
from ..shared.math import tanh
from ..shared.tir import T
from .spec import AttentionSpec
from .tvm_math import LOG2_E, minus_infinity

Expr = Any


@dataclass
class Arguments:
    """Run-time arguments as expressions (int64 where not stated; a constant may stand for any of them).

    Strides are in elements: `*_sb` batch, `*_sh` head, `*_st` token. `limits` int32 [B] holds the lengths
    or prefixes, `window` is 2**40 for none, `lse` is an address (0: not wanted), `scratch` the address of
    the scratch memory. `factor` (fp32) multiplies q: scale * log2(e), or scale / softcap; `cap` (fp32) is
    softcap * log2(e). Buffers are unbounded 1-D ones of the spec's types.
    """

    threads: Expr
    batch: Expr
    tq: Expr
    tk: Expr
    q_offset: Expr
    window: Expr
    chunk: Expr
    factor: Expr
    cap: Expr
    q: Expr
    q_sb: Expr
    q_sh: Expr
    q_st: Expr
    k: Expr
    k_sb: Expr
    k_sh: Expr
    k_st: Expr
    v: Expr
    v_sb: Expr
    v_sh: Expr
    v_st: Expr
    k_scale: Expr
    ks_sb: Expr
    ks_sh: Expr
    v_scale: Expr
    vs_sb: Expr
    vs_sh: Expr
    limits: Expr
    bias: Expr
    bias_sb: Expr
    bias_sh: Expr
    bias_st: Expr
    sinks: Expr
    out: Expr
    out_sb: Expr
    out_sh: Expr
    out_st: Expr
    lse: Expr
    scratch: Expr


def argument_types(spec: AttentionSpec) -> list[tuple[str, str]]:
    """Return (name, type) of a kernel's arguments in calling order."""
    special = {
        "factor": "float32",
        "cap": "float32",
        "q": "*" + spec.q_dtype,
        "k": "*" + spec.kv_dtype,
        "v": "*" + spec.kv_dtype,
        "k_scale": "*float32",
        "v_scale": "*float32",
        "limits": "*int32",
        "bias": "*" + spec.bias_dtype,
        "sinks": "*float32",
        "out": "*" + spec.q_dtype,
    }
    return [(f.name, special.get(f.name, "int64")) for f in fields(Arguments)]


@dataclass
class Problem:
    """A spec, an instruction set and the arguments: what every emitter takes."""

    spec: AttentionSpec
    isa: Isa
    args: Arguments

    @property
    def lanes(self) -> int:
        """fp32 elements of a vector."""
        return self.isa.lanes

    def interval(self, b: Expr, t: Expr) -> tuple[Expr, Expr]:
        """Emit and return [low, high): the keys that query token `t` of sequence `b` sees (low <= high)."""
        spec, a = self.spec, self.args
        ends = tir.local("int64", 2)
        p = a.q_offset + t
        tir.store(ends, 0, T.int64(0))
        tir.store(ends, 1, a.tk + T.int64(0))

        def lower(at: int, value: Expr) -> None:
            tir.store(ends, at, T.min(tir.load(ends, at), value))

        def raise_to(at: int, value: Expr) -> None:
            tir.store(ends, at, T.max(tir.load(ends, at), value))

        if spec.mask in ("causal", "causal_lengths"):
            lower(1, p + 1)
        elif spec.mask == "prefix":
            lower(1, T.max(p + 1, tir.cast(tir.load(a.limits, b), "int64")))
        if spec.mask == "causal_lengths":
            raise_to(0, a.tk - tir.cast(tir.load(a.limits, b), "int64"))
        if spec.window:
            raise_to(0, p - a.window + 1)
            lower(1, p + a.window)
        lower(0, a.tk + T.int64(0))
        raise_to(1, tir.load(ends, 0))
        return tir.load(ends, 0), tir.load(ends, 1)

    def row_at(self, base: str, b: Expr, h: Expr, t: Expr) -> Expr:
        """Return the offset of (b, h, t) in q, k, v, bias or out."""
        a = self.args
        return b * getattr(a, f"{base}_sb") + h * getattr(a, f"{base}_sh") + t * getattr(a, f"{base}_st")

    def scale_at(self, which: str, b: Expr, h: Expr) -> Expr:
        """Return the offset of head (b, h)'s scales."""
        short = which[0] + "s"
        return b * getattr(self.args, f"{short}_sb") + h * getattr(self.args, f"{short}_sh")

    def load_query(self, target: Expr, at: Expr, b: Expr, h: Expr, t: Expr) -> None:
        """Emit: q[b, h, t] times the factor to fp32 target[at:]."""
        a, lanes = self.args, self.lanes
        source = tir.let(self.row_at("q", b, h, t))
        with tir.loop(self.spec.head_dim // lanes) as i:
            value = tir.to_f32(a.q, source + i * lanes, lanes) * tir.splat(a.factor, lanes)
            tir.store(target, at + i * lanes, value)

    def finish_scores(self, score: Expr, bias: Expr | None) -> Expr:
        """Return a score vector in units of log2: soft-capped, then biased (`bias` is in log2 units too)."""
        if self.spec.softcap:
            score = tanh(score) * tir.splat(self.args.cap, self.lanes)
        return score if bias is None else score + bias

    def store_row(
        self, source: Expr, at: Expr, largest: Expr, total: Expr, b: Expr, h: Expr, t: Expr
    ) -> None:
        """Emit: source[at:] / total to out[b, h, t], and the row's lse; `largest` is in log2 units."""
        spec, a, lanes = self.spec, self.args, self.lanes
        target = tir.let(self.row_at("out", b, h, t))
        inverse = tir.local("float32", 1)
        empty = is_zero(total)
        tir.store(inverse, 0, T.float32(1) / total)
        with tir.when(empty):
            for_all = tir.f32(0.0, lanes)
            with tir.loop(spec.v_head_dim // lanes) as i:
                tir.from_f32(a.out, target + i * lanes, for_all)
        with tir.when(T.Not(empty)), tir.loop(spec.v_head_dim // lanes) as i:
            value = tir.load(source, at + i * lanes, lanes) * tir.splat(tir.load(inverse, 0), lanes)
            tir.from_f32(a.out, target + i * lanes, value)
        if spec.lse:
            lse = tir.buffer_at(a.lse, "float32")
            entry = (b * spec.num_heads + h) * a.tq + t
            tir.store(lse, entry, largest * T.float32(1 / LOG2_E) + T.log(total))

    def stage(
        self, target: Expr, at: Expr, source: Expr, start: Expr, count: Expr, factor: float = 1.0
    ) -> None:
        """Emit: source[start : start + count] times `factor` to fp32 target[at:], reading nothing beyond."""
        lanes = self.lanes
        whole = tir.let(quotient(count, T.int64(lanes)))
        with tir.loop(whole) as i:
            value = tir.to_f32(source, start + i * lanes, lanes)
            tir.store(target, at + i * lanes, value if factor == 1.0 else value * tir.f32(factor, lanes))
        with span(whole * lanes, count) as i:
            value = tir.to_f32(source, start + i, 1)
            tir.store(target, at + i, value if factor == 1.0 else value * T.float32(factor))


def widen(buffer: Expr, at: Expr, lanes: int) -> Expr:
    """Return elements of k or v as fp32 (int8 codes without their scale)."""
    if str(buffer.dtype) == "int8":
        return tir.cast(tir.cast(tir.load(buffer, at, lanes), "int32"), "float32")
    return tir.to_f32(buffer, at, lanes)


@contextlib.contextmanager
def span(start: Expr, stop: Expr) -> Iterator[Expr]:
    """Emit a serial loop over [start, stop) that counts from 0: TVM's StorageRewrite mishandles others."""
    with tir.loop(tir.let(stop - start)) as i:
        yield tir.let(start + i)


def quotient(a: Expr, b: Expr) -> Expr:
    """Return a / b of integers that are not negative (a floor division is dearer, and cannot be shared)."""
    return T.truncdiv(a, b)


def remainder(a: Expr, b: Expr) -> Expr:
    """Return a mod b of integers that are not negative."""
    return T.truncmod(a, b)


def is_zero(x: Expr) -> Expr:
    """Return whether an fp32 scalar is 0, by its bits: TVM's `!=` of floats says no for NaN."""
    return T.bitwise_and(tir.bits(x, "int32"), T.int32(0x7FFFFFFF)) == T.int32(0)


def safe_maximum(largest: Expr) -> Expr:
    """Return the largest score, or 0 for a row that saw nothing yet (-inf - -inf is NaN)."""
    return T.Select(largest == minus_infinity(), T.float32(0), largest)


def even_parts(count: int, most: int) -> list[int]:
    """Cut `count` into near-equal parts of at most `most`."""
    parts = -(-count // most)
    return [count // parts + (i < count % parts) for i in range(parts)]
