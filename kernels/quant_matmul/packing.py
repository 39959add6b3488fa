"""Weight layouts: `n32` streams blocks of 32 rows of W, group by group, codes beside their scales.

One block of 32 output columns and one group of G inputs is one run of bytes:
    codes   [G/(4P)][32][4]  P = 8/bits codes a byte; code p of byte run s is k = s*4P + 4p .. +3
    scale   [32]             scale dtype
    zero    [32]             minima (scale dtype) or zero points (uint8), if the format has them
5 and 6 bits are a plane of the 4 low bits, then one of the 1 or 2 high bits, each laid out so.
Where scales have two levels, a block of inputs (256) is one run: the codes of its groups, their scales,
their zeros, then the block's fp16 factors of scales [32] and of minima [32].
Blocks follow each other: decode reads one linear stream. Float weights are [N/32][K][32].
`signed` in a layout's name says that 8-bit codes are stored as signed bytes, else as code + 128.
With `pair`, blocks of the first half of the rows (gate) alternate with blocks of the second (up).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...compiler.errors import UnsupportedError
from ...compiler.target import Target, detect
from ..shared.isa.table import TABLE
from ..shared.memory import Arena, aligned_empty
from .weight_format import CanonicalWeight, WeightFormat

BLOCK = 32
_STEP = 1 << 20  # values packed at a time: the peak stays small, and so does what leaves the cache
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
        """Dot products (of 4 values a column) in a step: what one vector of the thinnest plane holds."""
        return 8 // min(self.format.plane_bits)

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of one group of a block."""
        return BLOCK * self.format.group_size * self.format.bits // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of one group of a block."""
        return BLOCK * self.format.torch_scale_dtype.itemsize

    @property
    def zero_bytes(self) -> int:
        """Bytes of the zeros of one group of a block."""
        if self.format.zero not in ("minimum", "integer"):
            return 0
        return BLOCK * self.format.torch_zero_dtype.itemsize

    @property
    def factor_bytes(self) -> int:
        """Bytes of the fp16 factors of scales (and as many of minima) of one block of inputs."""
        return 2 * BLOCK if self.format.block_size else 0

    @property
    def per_block(self) -> int:
        """Groups whose codes, scales and zeros stand together: those of a block of inputs, or one."""
        return self.format.block_size // self.format.group_size if self.format.block_size else 1

    @property
    def group_bytes(self) -> int:
        """Bytes of one group of a block, its part of the factors included."""
        factors = self.factor_bytes * (2 if self.zero_bytes else 1)
        return self.code_bytes + self.scale_bytes + self.zero_bytes + factors // self.per_block

    def codes_at(self, group: Any) -> Any:
        """Where the codes of a group begin; like the others for an int, or an expression of a kernel."""
        return self._part_at(group, 0, self.code_bytes)

    def scales_at(self, group: Any) -> Any:
        """Where the scales of a group begin."""
        return self._part_at(group, self.code_bytes, self.scale_bytes)

    def zeros_at(self, group: Any) -> Any:
        """Where the zeros of a group begin."""
        return self._part_at(group, self.code_bytes + self.scale_bytes, self.zero_bytes)

    def factors_at(self, block: Any, minimum: bool = False) -> Any:
        """Where the factors of a block of inputs begin: of its scales, or of its minima."""
        before = self.per_block * (self.code_bytes + self.scale_bytes + self.zero_bytes)
        return block * (self.per_block * self.group_bytes) + before + (self.factor_bytes if minimum else 0)

    def _part_at(self, group: Any, before: int, size: int) -> Any:
        if self.per_block == 1:
            return group * self.group_bytes + before
        block, inside = group // self.per_block, group % self.per_block
        return block * (self.per_block * self.group_bytes) + self.per_block * before + inside * size

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
    signed = fmt.bits == 8 and target.arch != "opencl"
    codes = TABLE[target.isa].int8_codes if signed else "unsigned"
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

    A weight on the meta device gets a buffer on the meta device: its size and layout, no memory.
    Raises UnsupportedError for a pair with an odd number of rows and for a weight that wants a gradient.
    """
    if any(t.requires_grad for t in weight.tensors().values()):
        raise UnsupportedError(_NO_GRADIENT)
    return _pack(weight.format, (weight.n, weight.k), weight.codes.is_meta, weight.rows, target, pair, arena)


def pack_float(
    weight: torch.Tensor, fmt: WeightFormat, target: Target | None = None, pair: bool = False,
    arena: Arena | None = None,
) -> PackedWeight:  # fmt: skip
    """Return pack(CanonicalWeight.from_float(weight, fmt), ...) of a float weight [N, K].

    Some rows at a time: what this takes besides the result is some megabytes, however large the weight.
    """

    def rows(index: torch.Tensor) -> CanonicalWeight:
        return CanonicalWeight.from_float(weight[index], fmt)

    n, k = weight.shape
    return _pack(fmt, (n, k), weight.is_meta, rows, target, pair, arena)


def _pack(
    fmt: WeightFormat, shape: tuple[int, int], meta: bool, rows_of: Callable[[torch.Tensor], CanonicalWeight],
    target: Target | None, pair: bool, arena: Arena | None,
) -> PackedWeight:  # fmt: skip
    (n, k), geometry = shape, Geometry(fmt, shape[1])
    if pair and n % 2:
        raise UnsupportedError(f"a gate and up pair needs an even number of rows, not {n}")
    layout = layout_for(fmt, target or detect(), pair)
    if meta:
        size = (2 * -(-n // 2 // BLOCK) if pair else -(-n // BLOCK)) * geometry.block_bytes
        return PackedWeight(torch.empty(size, dtype=torch.uint8, device="meta"), fmt, n, k, layout)
    rows = _block_rows(n, pair)
    blocks = rows.numel() // BLOCK
    buffer = (aligned_empty if arena is None else arena.take)(blocks * geometry.block_bytes)
    step = max(1, _STEP // max(1, BLOCK * k))
    view = buffer.view(blocks, geometry.block_bytes)
    for start in range(0, blocks, step):
        index = rows[start * BLOCK : (start + step) * BLOCK]
        there = index >= 0
        local = torch.where(there, there.cumsum(0) - 1, -1)  # padding is no row of the part
        view[start : start + step] = _pack_blocks(rows_of(index[there]), local, geometry, layout)
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
    parts = [_pack_planes(codes, blocks, g), _by_group(_take(weight.scale, index, g.groups), blocks)]
    if weight.zero is not None:
        parts.append(_by_group(_take(weight.zero, index, g.groups), blocks))
    if fmt.block_size:
        parts = [part.reshape(blocks, g.groups // g.per_block, -1) for part in parts]
        for factors in (weight.block_scale, weight.block_zero):
            if factors is not None:
                parts.append(_by_group(_take(factors, index, fmt.blocks(g.k)), blocks))
    return torch.cat(parts, 2).view(blocks, -1)


def _pack_planes(codes: torch.Tensor, blocks: int, g: Geometry) -> torch.Tensor:
    """Codes [blocks * 32, K] as bytes [blocks, groups, code bytes of a group]."""
    parts, shift, size = [], 0, g.format.group_size
    for bits in g.format.plane_bits:
        count = 8 // bits
        runs = codes.view(blocks, BLOCK, g.groups, size // (4 * count), count, 4).permute(0, 2, 3, 4, 1, 5)
        packed = torch.zeros(blocks, g.groups, size // (4 * count), BLOCK, 4, dtype=torch.uint8)
        for p in range(count):
            field = runs[:, :, :, p]
            if bits < g.format.bits:
                field = (field >> shift) & ((1 << bits) - 1)
            packed |= field << (p * bits)
        parts.append(packed.view(blocks, g.groups, -1))
        shift += bits
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def _unpack_planes(data: torch.Tensor, g: Geometry) -> torch.Tensor:
    """Bytes [blocks, groups, code bytes] as codes [blocks * 32, groups * group size]."""
    blocks, shift, start, codes = data.shape[0], 0, 0, None
    for bits in g.format.plane_bits:
        nbytes = BLOCK * g.format.group_size * bits // 8
        runs = data[:, :, start : start + nbytes].reshape(blocks, g.groups, -1, BLOCK, 4)
        fields = [((runs >> (p * bits)) & ((1 << bits) - 1)) << shift for p in range(8 // bits)]
        plane = torch.stack(fields, 3)  # [b, g, s, p, 32, 4]
        plane = plane.permute(0, 4, 1, 2, 3, 5).reshape(blocks * BLOCK, -1)
        codes = plane if codes is None else codes | plane
        start, shift = start + nbytes, shift + bits
    assert codes is not None
    return codes


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
    data = data.view(blocks, g.groups // g.per_block, g.per_block * g.group_bytes)

    def part(start: int, nbytes: int) -> torch.Tensor:
        """Bytes [blocks, groups (or blocks of inputs), nbytes / what a block holds]."""
        return data[:, :, start : start + nbytes].contiguous()

    codes = _unpack_planes(part(0, g.per_block * g.code_bytes).view(blocks, g.groups, -1), g)[:, :k]
    if fmt.zero == "none":
        codes = (
            codes.view(torch.int8)
            if "unsigned" not in packed.layout
            else (codes.to(torch.int16) - 128).to(torch.int8)
        )
    elif fmt.bits == 8 and "unsigned" not in packed.layout:
        codes = codes.bitwise_xor(128)

    def column(start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        raw = part(start, count * BLOCK * dtype.itemsize).view(dtype).view(blocks, -1, BLOCK)
        return place(raw.transpose(1, 2).reshape(blocks * BLOCK, -1))

    scale = column(g.scales_at(0), g.per_block, fmt.torch_scale_dtype)
    zero = column(g.zeros_at(0), g.per_block, fmt.torch_zero_dtype) if g.zero_bytes else None
    block_scale = block_zero = None
    if fmt.block_size:
        block_scale = column(g.factors_at(0), 1, torch.float16)
        block_zero = column(g.factors_at(0, minimum=True), 1, torch.float16) if g.zero_bytes else None
    return CanonicalWeight(fmt, place(codes), scale, zero, block_scale, block_zero)
