"""What the tuner has to know of the CPU form: phases, inputs to time, checks against the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from ...compiler.operator import Sizes, Tuning
from ...compiler.target import Target
from ..shared.trial import Copies, results
from .packing import PackedWeight, layout_for, pack
from .reference import quant_matmul as reference
from .sizes import uses_matrix
from .space import FEW, GEMV, MANY
from .spec import QuantMatmulSpec
from .weight_format import CanonicalWeight

_SWITCH = 32  # rows from which every configuration runs panels
_TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-8 + 1e-5, "float16": 2**-11 + 1e-5}  # half a unit of y
_CHECKED_ROWS = 48  # of many rows: their references are computed for so many
_SCALES = (1.0, 1e-4, 10.0)  # of the rows in turn: what is left of other values shows beside small ones
_DRAWS = 6  # rows a seed of a product of one: an error in half of a group shows in half of the draws
_COLUMNS = 1024  # of W that the reference takes at a time


def phase(spec: QuantMatmulSpec, sizes: Sizes) -> str:
    """Return which of the form's functions runs."""
    m = sizes["m"]
    if uses_matrix(spec) or m >= _SWITCH:
        return MANY
    return GEMV if m == 1 else FEW


def family(spec: QuantMatmulSpec, target: Target) -> tuple[str, dict[str, int]]:
    """Return types, epilogue and layout; N and K are sizes."""
    layout = layout_for(spec.weight, target, spec.pair)
    return f"{spec.key().split(' ', 1)[1]} {layout}", {"n": spec.n, "k": spec.k}


def functions(spec: QuantMatmulSpec, which: str) -> tuple[str, ...]:
    """Return the native functions that a phase may call, where the configuration has them."""
    return {GEMV: ("gemv",), FEW: ("rows", "wide", "gemm"), MANY: ("gemm",)}[which]


def check(spec: QuantMatmulSpec, sizes: Sizes, target: Target, call: Callable[..., Any], seed: int) -> str:
    """Return what is wrong with `call` at the edges of the bucket of sizes["m"], past it, at odd sizes."""
    case = _case(spec, target)
    for m in _edges(spec, sizes["m"], seed):
        if problem := _wrong(case, m, call, seed):
            return f"{m} rows, seed {seed}: {problem}"
    return ""


def _wrong(case: _Case, m: int, call: Callable[..., Any], seed: int) -> str:
    x, bias, residual, rows, wanted = case.rows(_DRAWS if m == 1 else m, seed)
    parts = [(x, residual)]
    if m == 1:
        parts = [(x[i : i + 1], None if residual is None else residual[i : i + 1]) for i in rows]
    for got in results(lambda: torch.cat([call(x, case.packed, bias, added) for x, added in parts])):
        if not torch.isfinite(got).all():
            return "not every element of y was written with a number"
        error = (got[rows].double() - wanted).norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-30)
        if not float(error.max()) <= _TOLERANCE[case.spec.x_dtype]:
            return f"relative error {float(error.max()):.1e}"
    return ""


def _edges(spec: QuantMatmulSpec, m: int, seed: int) -> list[int]:
    low = 1 << m.bit_length() - 1
    around = ([low, 2 * low], [2 * low - 1], [low + low // 3 * 2 | 1])[seed % 3]
    least, most = (1, 1) if phase(spec, {"m": m}) == GEMV else (2, 1 << 30)
    if phase(spec, {"m": m}) == MANY and not uses_matrix(spec):
        least = _SWITCH
    return sorted({min(max(rows, least), most) for rows in around})


class _Case:
    """A random weight of a problem, and reference results."""

    def __init__(self, spec: QuantMatmulSpec, target: Target) -> None:
        self.spec = spec
        generator = torch.Generator().manual_seed(spec.n * 31 + spec.k)
        pieces = []  # some rows at a time: of a large weight, fp32 values are eight times the codes
        for at in range(0, spec.n, 4096):
            values = torch.randn(min(4096, spec.n - at), spec.k, generator=generator)
            pieces.append(CanonicalWeight.from_float(values, spec.weight))
        self.weight = pieces[0] if len(pieces) == 1 else CanonicalWeight.cat(pieces)
        self.packed = pack(self.weight, target, pair=spec.pair)
        self._rows: dict[tuple[int, int], Any] = {}

    def rows(self, m: int, seed: int) -> Any:
        """Return (x, bias, residual, the rows that are compared, what they should be)."""
        if (m, seed) not in self._rows:
            spec, generator = self.spec, torch.Generator().manual_seed(seed * 7919 + m)
            dtype = getattr(torch, spec.x_dtype)
            scales = torch.tensor(_SCALES)[torch.arange(m) % len(_SCALES), None]
            x = (torch.randn(m, spec.k, generator=generator) * scales).to(dtype)
            bias = torch.randn(spec.n, generator=generator) if spec.bias else None
            residual = torch.randn(m, spec.n_out, generator=generator).to(dtype) if spec.residual else None
            rows = torch.arange(m)
            if m > _CHECKED_ROWS:  # the first and the last, and some between
                middle = torch.randperm(m - 32, generator=generator)[: _CHECKED_ROWS - 32] + 16
                rows = torch.cat([rows[:16], middle.sort().values, rows[-16:]])
            wanted = self._reference(x[rows], bias, None if residual is None else residual[rows])
            self._rows[m, seed] = (x, bias, residual, rows, wanted)
        return self._rows[m, seed]

    def _reference(self, x: torch.Tensor, bias: Any, residual: Any) -> torch.Tensor:
        """Apply the reference to some columns at a time: it holds the weight in fp64."""
        spec, w, parts = self.spec, self.weight, []
        half = spec.n_out
        for at in range(0, half, _COLUMNS):
            end = min(at + _COLUMNS, half)
            which = torch.arange(at, end)
            if spec.pair:
                which = torch.cat([which, which + half])
            some = CanonicalWeight(
                w.format, w.codes[which], *(None if t is None else t[which] for t in (w.scale, w.zero))
            )
            part = dataclasses.replace(spec, n=len(which), x_dtype="float32")
            parts.append(
                reference(
                    part, x.float(), some, None if bias is None else bias[which],
                    None if residual is None else residual[:, at:end].float(),
                ).double()
            )  # fmt: skip
        return torch.cat(parts, dim=1)


_held: dict[str, Any] = {}


def _case(spec: QuantMatmulSpec, target: Target) -> _Case:
    """Return the case of a problem; one is held, its references serve every configuration."""
    key = (spec, target.isa)
    if _held.get("key") != key:
        _held.clear()
        _held.update(key=key, case=_Case(spec, target))
    return _held["case"]


class Workload:
    """One matmul on `copies` of its weight, so that each call reads one that no cache holds."""

    def __init__(self, spec: QuantMatmulSpec, sizes: Sizes, target: Target, cache_bytes: int) -> None:
        m, packed = sizes["m"], _case(spec, target).packed
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, spec.x_dtype)
        self._x = torch.randn(m, spec.k, generator=generator).to(dtype)
        self._bias = torch.zeros(spec.n) if spec.bias else None
        self._residual = torch.randn(m, spec.n_out, generator=generator).to(dtype) if spec.residual else None
        self._out = torch.empty(m, spec.n_out, dtype=dtype)
        tensors = self._x, self._bias, self._out, self._residual
        self._row = [0 if t is None else t.data_ptr() for t in tensors] if m == 1 else None
        copies = Copies(packed.nbytes, cache_bytes)
        copies.fill(packed.buffer)
        self._weights = [
            PackedWeight(copies.view(i)[: packed.nbytes], spec.weight, spec.n, spec.k, packed.layout)
            for i in range(copies.count)
        ]
        self.copies, self.area = copies.count, copies.area
        self.nbytes = packed.nbytes + m * (spec.k + spec.n_out) * self._x.element_size()
        self.operations = spec.operations(m)
        self.arithmetic = "float" if spec.activation == "float" or spec.weight.is_float else spec.activation

    def run(self, call: Callable[..., Any], index: int) -> Any:
        """Multiply with copy `index` of the weight; one row as a decode step does, at bare addresses."""
        row = getattr(call, "row", None)
        if row is not None and self._row is not None:
            x, bias, y, residual = self._row
            return row(x, self._weights[index % self.copies].buffer.data_ptr(), bias, y, residual)
        return call(self._x, self._weights[index % self.copies], self._bias, self._residual)


TUNING = Tuning(phase, family, functions, Workload, check)
