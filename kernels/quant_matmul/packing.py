"""Weight layouts: `n32` streams blocks of 32 rows of W, group by group, codes beside their scales.

One block of 32 output columns and one group of G inputs is one run of bytes:
    codes   [G/(4P)][32][4]  P = 8/bits planes; plane p of byte run s holds k = s*4P + 4p .. +3
    scale   [32]             scale dtype
    zero    [32]             minima (scale dtype) or zero points (uint8), if the format has them
Blocks follow each other: decode reads one linear stream. Float weights are [N/32][K][32].
`signed` in a layout's name says that 8-bit codes are stored as signed bytes, else as code + 128.
With `pair`, blocks of the first half of the rows (gate) alternate with blocks of the second (up).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...compiler.errors import UnsupportedError
from ...compiler.target import Target, detect
from ..shared.isa.table import INT8_CODES
from ..shared.memory import Arena, aligned_empty
from .weight_format import CanonicalWeight, WeightFormat

BLOCK = 32
_NO_GRADIENT = (
    "a packed weight has no gradient; detach() it and train an adapter beside it, "
    "or multiply by unpack().dequantize()"
)
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Geometry:
    """Sizes of the `n32` layout for a format and K, in bytes."""

    format: WeightFormat
    k: int

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return self.format.groups(self.k)

    @property
    def planes(self) -> int:
        """Codes in a byte."""
        return 8 // self.format.bits

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of one group of a block."""
        return BLOCK * self.format.group_size * self.format.bits // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of one group of a block."""
        return BLOCK * _BYTES[self.format.scale_dtype]

    @property
    def zero_bytes(self) -> int:
        """Bytes of the zeros of one group of a block."""
        return {"minimum": self.scale_bytes, "integer": BLOCK}.get(self.format.zero, 0)

    @property
    def group_bytes(self) -> int:
        """Bytes of one group of a block."""
        return self.code_bytes + self.scale_bytes + self.zero_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of 32 rows."""
        if self.format.is_float:
            return BLOCK * self.k * _BYTES[self.format.dtype]
        return self.groups * self.group_bytes


class PackedWeight:
    """A weight [N, K] in one buffer in one layout; only this buffer is in memory.

    Copying, pickling and `unpack()` go through the canonical form, so a PackedWeight may move to a
    machine whose target wants another layout.
    """

    def __init__(self, buffer: torch.Tensor, fmt: WeightFormat, n: int, k: int, layout: str) -> None:
        self.buffer, self.format, self.n, self.k, self.layout = buffer, fmt, n, k, layout

    @property
    def pair(self) -> bool:
        """Whether gate and up blocks alternate."""
        return self.layout.endswith("pair")

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.buffer.numel()

    def unpack(self) -> CanonicalWeight:
        """Return the canonical form, bit for bit what was packed."""
        return unpack(self)

    @property
    def requires_grad(self) -> bool:
        """Always False: see `requires_grad_`."""
        return False

    def requires_grad_(self, requires_grad: bool = True) -> PackedWeight:
        """Return self; raise UnsupportedError when a gradient is asked for."""
        if requires_grad:
            raise UnsupportedError(_NO_GRADIENT)
        return self

    def __repr__(self) -> str:
        return f"PackedWeight({self.n}x{self.k} {self.format.key()} {self.layout} {self.nbytes / 1e6:.1f} MB)"

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        own = aligned_empty(self.nbytes).copy_(self.buffer)  # not what else lies in its memory
        return PackedWeight(own, self.format, self.n, self.k, self.layout)

    def __reduce__(self) -> tuple[Any, ...]:
        return _repack, (self.unpack(), self.pair)


def _repack(weight: CanonicalWeight, pair: bool) -> PackedWeight:
    return pack(weight, pair=pair)


def layout_for(fmt: WeightFormat, target: Target, pair: bool = False) -> str:
    """Return the layout id that `target`'s kernels read."""
    codes = INT8_CODES[target.isa] if fmt.bits == 8 else "unsigned"
    return f"n32.{codes}" + (".pair" if pair else "")


def _block_rows(n: int, pair: bool) -> torch.Tensor:
    """Return, for every row of the layout, the row of W it holds (-1: padding)."""
    part = n // 2 if pair else n
    blocks = -(-part // BLOCK)
    rows = torch.full((blocks * BLOCK,), -1, dtype=torch.int64)
    rows[:part] = torch.arange(part)
    if not pair:
        return rows
    up = torch.where(rows >= 0, rows + part, rows)
    return torch.stack([rows.view(blocks, BLOCK), up.view(blocks, BLOCK)], 1).reshape(-1)


def pack(
    weight: CanonicalWeight, target: Target | None = None, pair: bool = False, arena: Arena | None = None
) -> PackedWeight:
    """Lay a canonical weight out for `target` (default: this host), in memory of `arena` if one is given.

    Raises UnsupportedError for a pair with an odd number of rows and for a weight that wants a gradient.
    """
    fmt, n, k = weight.format, weight.n, weight.k
    if any(t is not None and t.requires_grad for t in (weight.codes, weight.scale, weight.zero)):
        raise UnsupportedError(_NO_GRADIENT)
    if pair and n % 2:
        raise UnsupportedError(f"a gate and up pair needs an even number of rows, not {n}")
    layout = layout_for(fmt, target or detect(), pair)
    geometry = Geometry(fmt, k)
    rows = _block_rows(n, pair)
    blocks = rows.numel() // BLOCK
    buffer = (aligned_empty if arena is None else arena.take)(blocks * geometry.block_bytes)
    step = max(1, (16 << 20) // max(1, BLOCK * k))  # pack some blocks at a time: the peak stays small
    view = buffer.view(blocks, geometry.block_bytes)
    for start in range(0, blocks, step):
        index = rows[start * BLOCK : (start + step) * BLOCK]
        view[start : start + step] = _pack_blocks(weight, index, geometry, layout)
    return PackedWeight(buffer, fmt, n, k, layout)


def _take(tensor: torch.Tensor, index: torch.Tensor, columns: int) -> torch.Tensor:
    """Gather rows (zeros where the index is -1) and pad the columns with zeros."""
    out = torch.zeros(index.numel(), columns, dtype=tensor.dtype)
    valid = index >= 0
    out[valid, : tensor.shape[1]] = tensor[index[valid]]
    return out


def _pack_blocks(weight: CanonicalWeight, index: torch.Tensor, g: Geometry, layout: str) -> torch.Tensor:
    fmt, blocks = weight.format, index.numel() // BLOCK
    if fmt.is_float:
        rows = _take(weight.codes, index, g.k)
        return rows.view(blocks, BLOCK, g.k).transpose(1, 2).contiguous().view(blocks, -1).view(torch.uint8)
    assert weight.scale is not None
    codes = _take(weight.codes, index, g.groups * fmt.group_size)
    if fmt.zero == "none":
        codes = (
            codes.view(torch.uint8)
            if "unsigned" not in layout
            else (codes.to(torch.int16) + 128).to(torch.uint8)
        )
    elif fmt.bits == 8 and "unsigned" not in layout:
        codes = codes.bitwise_xor(128)
    planes = g.planes
    runs = codes.view(blocks, BLOCK, g.groups, fmt.group_size // (4 * planes), planes, 4).permute(
        0, 2, 3, 4, 1, 5
    )
    packed = torch.zeros(blocks, g.groups, fmt.group_size // (4 * planes), BLOCK, 4, dtype=torch.uint8)
    for p in range(planes):
        packed |= runs[:, :, :, p] << (p * fmt.bits)
    parts = [packed.view(blocks, g.groups, -1), _by_group(_take(weight.scale, index, g.groups), blocks)]
    if weight.zero is not None:
        parts.append(_by_group(_take(weight.zero, index, g.groups), blocks))
    return torch.cat(parts, 2).view(blocks, -1)


def _by_group(values: torch.Tensor, blocks: int) -> torch.Tensor:
    """[blocks*32, groups] -> bytes [blocks, groups, 32 * size]."""
    moved = values.view(blocks, BLOCK, -1).transpose(1, 2).contiguous()
    return moved.view(torch.uint8).view(blocks, moved.shape[1], -1)


def unpack(packed: PackedWeight) -> CanonicalWeight:
    """Return the canonical form of a packed weight, bit for bit."""
    fmt, n, k = packed.format, packed.n, packed.k
    g = Geometry(fmt, k)
    rows = _block_rows(n, packed.pair)
    blocks = rows.numel() // BLOCK
    data = packed.buffer.view(blocks, g.block_bytes)

    def place(values: torch.Tensor) -> torch.Tensor:
        out = torch.empty(n, values.shape[1], dtype=values.dtype)
        valid = rows >= 0
        out[rows[valid]] = values[valid]
        return out

    if fmt.is_float:
        values = data.contiguous().view(fmt.torch_dtype).view(blocks, k, BLOCK).transpose(1, 2).reshape(-1, k)
        return CanonicalWeight(fmt, place(values))
    data = data.view(blocks, g.groups, g.group_bytes)
    runs = data[:, :, : g.code_bytes].reshape(blocks, g.groups, -1, BLOCK, 4)
    mask = (1 << fmt.bits) - 1
    split = torch.stack([(runs >> (p * fmt.bits)) & mask for p in range(g.planes)], 3)  # [b, g, s, p, 32, 4]
    codes = split.permute(0, 4, 1, 2, 3, 5).reshape(blocks * BLOCK, -1)[:, :k]
    if fmt.zero == "none":
        codes = (
            codes.view(torch.int8)
            if "unsigned" not in packed.layout
            else (codes.to(torch.int16) - 128).to(torch.int8)
        )
    elif fmt.bits == 8 and "unsigned" not in packed.layout:
        codes = codes.bitwise_xor(128)

    def column(start: int, nbytes: int, dtype: torch.dtype) -> torch.Tensor:
        raw = data[:, :, start : start + nbytes].contiguous().view(dtype).view(blocks, g.groups, BLOCK)
        return place(raw.transpose(1, 2).reshape(blocks * BLOCK, g.groups))

    scale = column(g.code_bytes, g.scale_bytes, fmt.torch_scale_dtype)
    zero = None
    if g.zero_bytes:
        dtype = torch.uint8 if fmt.zero == "integer" else fmt.torch_scale_dtype
        zero = column(g.code_bytes + g.scale_bytes, g.zero_bytes, dtype)
    return CanonicalWeight(fmt, place(codes), scale, zero)
