"""The instruction-set entries by name; each lives in its own file and emits TIR."""

from __future__ import annotations

import dataclasses
from typing import Any

from ....compiler.target import Target


@dataclasses.dataclass(frozen=True)
class Isa:
    """What kernels need to know of an instruction set.

    `lanes` 32-bit lanes make a vector, `registers` vectors fit the register file. `dot4(acc, u8, s8)`
    adds four neighbouring u8*s8 products into each accumulator element: int32 x lanes, or int16 x
    2*lanes when `accumulator` is "int16", where at most `dot4_steps(umax)` additions fit before
    `widen(acc)` has to bring them to int32. `dot2(acc, s16, s16)` adds two neighbouring products.
    `int8_codes` says whether 8-bit weights are stored as unsigned (code + 128) or signed bytes.
    `gemm_rows` is the default number of rows of a register tile that is two vectors wide.
    `matrix` is None, or emits a bf16 matrix unit's tile operations (see amx.py).
    """

    name: str
    lanes: int
    registers: int
    accumulator: str
    int8_codes: str
    gemm_rows: int
    emit: Any
    matrix: Any = None

    def dot4(self, acc: Any, u8: Any, s8: Any) -> Any:
        """acc += u8 . s8 in quads."""
        return self.emit.dot4(self.lanes, acc, u8, s8)

    def dot4_steps(self, umax: int) -> int:
        """How many dot4 additions of codes up to `umax` fit the accumulator."""
        return 32767 // (2 * 127 * umax) if self.accumulator == "int16" else 1 << 20

    def widen(self, acc: Any) -> Any:
        """Bring a dot4 accumulator to int32 x lanes."""
        return self.emit.widen(self.lanes, acc) if self.accumulator == "int16" else acc

    def dot4_signed(self, acc32: Any, w_s8: Any, a_s8: Any) -> Any:
        """acc32 += w . a in quads, both signed, a in [-127, 127]; exact for every w."""
        return self.emit.dot4_signed(self.lanes, acc32, w_s8, a_s8)

    def dot2(self, acc32: Any, a_s16: Any, b_s16: Any) -> Any:
        """acc32 += a . b in pairs of int16."""
        return self.emit.dot2(self.lanes, acc32, a_s16, b_s16)


def by_name(name: str) -> Isa:
    """Return the entry `name`: amx, avx512_vnni, avx2, portable, or portable16 (amx's shapes on any CPU)."""
    from . import amx, avx2, avx512_vnni, portable, portable_matrix

    table = {
        "amx": Isa("amx", 16, 32, "int32", "unsigned", 12, avx512_vnni, amx),
        "avx512_vnni": Isa("avx512_vnni", 16, 32, "int32", "unsigned", 12, avx512_vnni),
        "avx2": Isa("avx2", 8, 16, "int16", "signed", 6, avx2),
        "portable": Isa("portable", 4, 16, "int32", "unsigned", 4, portable),
        "portable16": Isa("portable16", 16, 32, "int32", "unsigned", 12, portable, portable_matrix),
    }
    return table[name]


def for_target(target: Target) -> Isa:
    """Return the entry that `target` names."""
    return by_name(target.isa)


# What packing needs to know without importing tvm.
INT8_CODES = {
    "amx": "unsigned",
    "avx512_vnni": "unsigned",
    "avx2": "signed",
    "portable": "unsigned",
    "portable16": "unsigned",
}
# Entries with a bf16 matrix unit: tiles of 16 x 32 times 32 x 16.
MATRIX = frozenset({"amx", "portable16"})
