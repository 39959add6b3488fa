"""Sizes of the scratch memory of the whole step. Needs no TVM."""

from __future__ import annotations

from dataclasses import dataclass

from ..quant_matmul.sizes import element_bytes, is_integer, padded_k, panel_bytes
from .spec import DecoderStepSpec

BARRIER_BYTES = 256  # see shared/barrier.py
OFFERS = ("o", "gate_up", "down", "head")  # the weights whose blocks threads take from one another
OFFER_BYTES = 64 * len(OFFERS)  # each on a line of its own (see shared/claim.py)


@dataclass(frozen=True)
class ThreadArea:
    """A thread's scratch: `fixed_bytes` (one fp32 row, its offers), then `row_bytes` a prepared row."""

    fixed_bytes: int
    code_bytes: int
    group_bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one prepared row: codes, scales, sums."""
        return self.code_bytes + 2 * self.group_bytes


def thread_area(spec: DecoderStepSpec, rows: int) -> ThreadArea:
    """Return the sizes that fit the largest of the step's products (each a multiple of 64 bytes)."""
    codes, groups = 64, 64
    for problem in (*spec.products(), spec.matmul("head")):
        fmt = problem.weight
        if fmt.is_float or spec.activation == "float":
            padded = -(-problem.k // 128) * 128
            codes = max(codes, 4 * padded)
        else:
            count = fmt.groups(problem.k)
            codes, groups = max(codes, count * fmt.group_size), max(groups, 4 * count)
    return ThreadArea(_line(4 * spec.hidden) + 64 + OFFER_BYTES, _line(codes), _line(groups))


@dataclass(frozen=True)
class ChunkArea:
    """Scratch for many rows: codes, scales and sums of each row, shared; a fp32 row and panels a thread."""

    code_bytes: int
    group_bytes: int
    fixed_bytes: int
    panel_bytes: int

    def nbytes(self, rows: int, threads: int) -> int:
        """Return the bytes for so many (padded) rows and threads."""
        shared = rows * (self.code_bytes + 2 * self.group_bytes)
        return shared + threads * (self.fixed_bytes + self.panel_bytes)


def chunk_area(spec: DecoderStepSpec, isa: str) -> ChunkArea:
    """Return the sizes that fit the largest of the layers' products (each a multiple of 64 bytes)."""
    problems = spec.products()
    codes = max(padded_k(p) * element_bytes(p, isa) for p in problems)
    groups = max(4 * p.weight.groups(p.k) if is_integer(p) else 0 for p in problems)
    panels = max(panel_bytes(p, isa) for p in problems)
    return ChunkArea(_line(codes), _line(groups), _line(4 * spec.hidden) + 64, _line(panels))


def _line(nbytes: int) -> int:
    return -(-nbytes // 64) * 64
