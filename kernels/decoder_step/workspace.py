"""Sizes of the scratch memory of the whole step. Needs no TVM."""

from __future__ import annotations

from dataclasses import dataclass

from .spec import DecoderStepSpec


@dataclass(frozen=True)
class ThreadArea:
    """A thread's scratch: `fixed_bytes` (one fp32 row), then `row_bytes` for every prepared row."""

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
    for name in ("qkv", "o", "gate_up", "down", "head"):
        problem = spec.matmul(name)
        fmt = problem.weight
        if fmt.is_float or spec.activation == "float":
            padded = -(-problem.k // 128) * 128
            codes = max(codes, 4 * padded)
        else:
            count = fmt.groups(problem.k)
            codes, groups = max(codes, count * fmt.group_size), max(groups, 4 * count)
    return ThreadArea(_line(4 * spec.hidden) + 64, _line(codes), _line(groups))


def _line(nbytes: int) -> int:
    return -(-nbytes // 64) * 64
