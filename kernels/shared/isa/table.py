"""The instruction-set entries by name; each file emits TIR for one. Needs no TVM before it emits."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from ....compiler.target import Target


@dataclass(frozen=True)
class Isa:
    """What kernels need to know of an instruction set; `module` is the file that emits its instructions.

    `lanes` 32-bit lanes make a vector, `registers` vectors fit the register file. `dot4(acc, u8, s8)`
    adds four neighbouring u8*s8 products into each lane: one int32 accumulator a lane, or `sums` int16 ones,
    where at most `dot4_steps(umax)` additions fit before `widen(acc)` has to bring them to int32.
    `dot2(acc, s16, s16)` adds two neighbouring products. `int8_codes` says whether 8-bit weights are stored
    as unsigned (code + 128) or signed bytes; where signed, dot4 takes codes up to 127 only, and `pairs` says
    that many rows are multiplied as int16 pairs by dot2. `gemm_rows` is the number of rows of a register
    tile that is two vectors wide; `tiles` are the (small, large) numbers of rows of a product's tiles, the
    default first, `small_vectors` the vectors that a small one is wide. With `words` > 1 a dot product takes
    an element of a vector of so many activation words. With `squares`, `square(acc, w, a, unsigned)`
    multiplies 2 columns and 2 rows over 8 values of K (see neon_i8mm.py), for the products of many rows.
    `matrix_module` names the file of a bf16 matrix unit's tile operations (see amx.py).
    """

    name: str
    lanes: int
    registers: int
    sums: int
    int8_codes: str
    gemm_rows: int
    tiles: tuple[tuple[int, int], ...]
    module: str
    pairs: bool = False
    matrix_module: str = ""
    words: int = 1
    squares: bool = False
    small_vectors: int = 2

    @property
    def emit(self) -> Any:
        """The functions that emit this entry's instructions."""
        return importlib.import_module(f".{self.module}", __package__)

    @property
    def matrix(self) -> Any:
        """The functions of the matrix unit, or None."""
        return importlib.import_module(f".{self.matrix_module}", __package__) if self.matrix_module else None

    @property
    def accumulator(self) -> str:
        """The type of dot4's accumulators."""
        return "int32" if self.sums == 1 else "int16"

    @property
    def accumulator_lanes(self) -> int:
        """The elements of a dot4 accumulator."""
        return self.sums * self.lanes

    def dot4(self, acc: Any, u8: Any, s8: Any) -> Any:
        """acc += u8 . s8 in quads."""
        return self.emit.dot4(self.lanes, acc, u8, s8)

    def dot4_steps(self, umax: int) -> int:
        """How many dot4 additions of codes up to `umax` fit the accumulator."""
        return 32767 // (4 // self.sums * 127 * umax) if self.sums > 1 else 1 << 20

    def widen(self, acc: Any) -> Any:
        """Bring a dot4 accumulator to int32 x lanes."""
        return self.emit.widen(self.lanes, acc) if self.sums > 1 else acc

    def dot4_signed(self, acc32: Any, w_s8: Any, a_s8: Any) -> Any:
        """acc32 += w . a in quads, both signed, a in [-127, 127]; exact for every w."""
        return self.emit.dot4_signed(self.lanes, acc32, w_s8, a_s8)

    def dot2(self, acc32: Any, a_s16: Any, b_s16: Any) -> Any:
        """acc32 += a . b in pairs of int16."""
        return self.emit.dot2(self.lanes, acc32, a_s16, b_s16)


_WIDE = ((4, 12), (4, 8), (8, 12))
_NARROW = ((4, 4), (4, 6), (2, 4), (2, 6))
# A small tile takes a block's 32 columns at once: in two passes its bytes would come from memory twice.
_NARROW_WHOLE = ((2, 4), (2, 6), (4, 4), (4, 6))
_ARM = ((4, 8), (4, 4), (2, 8))

_ENTRIES = (
    Isa("amx", 16, 32, 1, "unsigned", 12, _WIDE, "avx512_vnni", matrix_module="amx"),
    Isa("avx512_vnni", 16, 32, 1, "unsigned", 12, _WIDE, "avx512_vnni"),
    Isa("avx512", 16, 32, 2, "signed", 12, _WIDE, "avx512", pairs=True),
    Isa("avx_vnni", 8, 16, 1, "unsigned", 6, _NARROW, "avx_vnni"),
    Isa("avx2", 8, 16, 2, "signed", 6, _NARROW_WHOLE, "avx2", pairs=True, small_vectors=4),
    Isa("i8mm", 4, 32, 1, "signed", 8, _ARM, "neon_i8mm", words=4, squares=True),
    Isa("dotprod", 4, 32, 1, "signed", 8, _ARM, "neon_dotprod", words=4),
    Isa("neon", 4, 32, 4, "signed", 8, _ARM, "neon"),
    Isa("portable", 4, 16, 1, "unsigned", 4, ((2, 4), (1, 2)), "portable"),
    Isa("portable16", 16, 32, 1, "unsigned", 12, ((4, 12),), "portable", matrix_module="portable_matrix"),
)
TABLE = {entry.name: entry for entry in _ENTRIES}


def by_name(name: str) -> Isa:
    """Return an entry; "portable" runs on any LLVM CPU, "portable16" is amx's shapes in its arithmetic."""
    return TABLE[name]


def for_target(target: Target) -> Isa:
    """Return the entry that `target` names."""
    return by_name(target.isa)


# Entries with a bf16 matrix unit: tiles of 16 x 32 times 32 x 16.
MATRIX = frozenset(name for name, entry in TABLE.items() if entry.matrix_module)
