"""Sizes of the CPU form's scratch memory: what the kernels use and the caller allocates. Needs no TVM."""

from __future__ import annotations

from dataclasses import dataclass

from ..quant_matmul.sizes import element_bytes, is_integer, line, padded_k
from ..quant_matmul.spec import QuantMatmulSpec
from .spec import SparseMlpSpec


@dataclass(frozen=True)
class Area:
    """Byte offsets of the scratch: rows of x, fp32 gates and hidden values, rows of h, flags and list."""

    x_codes: int
    x_scales: int
    x_sums: int
    gates: int
    h_codes: int
    h_scales: int
    h_sums: int
    flags: int
    listed: int
    nbytes: int


def area(spec: SparseMlpSpec, isa: str, rows: int) -> Area:
    """Return the offsets for so many (padded) rows."""
    pair, down = spec.products()
    sizes = [*_prepared(pair, isa, rows), rows * spec.neurons * 4, *_prepared(down, isa, rows)]
    sizes += [spec.neurons // 32 * 4, (spec.blocks + 1) * 4]
    offsets, at = [], 0
    for size in sizes:
        offsets.append(at)
        at += line(size)
    return Area(*offsets, nbytes=at)


def _prepared(problem: QuantMatmulSpec, isa: str, rows: int) -> tuple[int, int, int]:
    """Return the bytes of codes, scales and sums of prepared rows (small M: never int16 pairs)."""
    groups = problem.weight.groups(problem.k) * 4 if is_integer(problem) else 0
    size = 1 if is_integer(problem) else element_bytes(problem, isa)
    return rows * padded_k(problem) * size, rows * groups, rows * groups
