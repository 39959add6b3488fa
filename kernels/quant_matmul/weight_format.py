"""WeightFormat and CanonicalWeight: what a weight means, apart from how a kernel wants it laid out."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from ...compiler.errors import UnsupportedError

_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


_INTEGERS = {"int8": torch.int8, "uint8": torch.uint8}
# Bits of the planes that a code is cut into, the low bits first.
_PLANES = {2: (2,), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


@dataclass(frozen=True)
class WeightFormat:
    """How numbers stand for a weight; knows no layout.

    Integer weights hold `bits`-bit codes in groups of `group_size` along K, each group with a scale:
    value = scale * (code - z), where z is 0 for zero="none" (signed codes), 2**(bits-1) for "constant",
    a stored integer for "integer"; for "minimum" value = scale * code + minimum.
    With `block_size` scales have two levels: a group holds an integer (`scale_dtype` "int8" or "uint8";
    minima uint8) and every `block_size` values fp16 factors, so scale = block scale * integer, in fp32
    (GGUF's K-quants). A row is whole blocks then: `groups` counts those past K.
    Float weights have dtype "float32", "bfloat16" or "float16" and bits 0.
    """

    dtype: str
    bits: int = 0
    group_size: int = 0
    scale_dtype: str = "float16"
    zero: str = "none"
    block_size: int = 0

    def __post_init__(self) -> None:
        if self.dtype in _FLOATS:
            if self.bits or self.group_size:
                raise UnsupportedError(f"a {self.dtype} weight has neither bits nor groups")
            return
        if self.dtype != "int" or self.bits not in _PLANES:
            raise UnsupportedError(
                f"no weight format with dtype {self.dtype!r} and {self.bits} bits; "
                f"bits: {', '.join(map(str, _PLANES))}"
            )
        if self.group_size not in (16, 32, 64, 128) or self.group_size % (32 // min(self.plane_bits)):
            raise UnsupportedError(f"{self.bits}-bit codes do not come in groups of {self.group_size}")
        scales = _INTEGERS if self.block_size else _FLOATS
        if self.zero not in ("none", "constant", "integer", "minimum") or self.scale_dtype not in scales:
            raise UnsupportedError(f"unknown zero {self.zero!r} or scale type {self.scale_dtype!r}")
        if self.zero == "none" and self.bits != 8:
            raise UnsupportedError("signed codes are stored for 8 bits only; use zero='constant'")
        if self.block_size and (self.block_size % self.group_size or self.zero == "integer"):
            raise UnsupportedError(
                f"blocks of {self.block_size} with zero {self.zero!r} in groups of {self.group_size}"
            )

    @staticmethod
    def int4(group_size: int = 32, zero: str = "constant", scale_dtype: str = "float16") -> WeightFormat:
        """Return a 4-bit format (GGUF: Q4_0 is constant, Q4_1 is minimum, both in groups of 32)."""
        return WeightFormat("int", 4, group_size, scale_dtype, zero)

    @staticmethod
    def blocked(bits: int, group_size: int, zero: str = "minimum") -> WeightFormat:
        """Return a format with scales in two levels, blocks of 256 (GGUF: Q4_K, Q5_K: minimum; Q6_K)."""
        return WeightFormat("int", bits, group_size, "uint8" if zero == "minimum" else "int8", zero, 256)

    @staticmethod
    def int8(group_size: int = 32, zero: str = "none", scale_dtype: str = "float16") -> WeightFormat:
        """Return an 8-bit format (GGUF: Q8_0 is signed codes in groups of 32)."""
        return WeightFormat("int", 8, group_size, scale_dtype, zero)

    @staticmethod
    def float(dtype: str | torch.dtype = "bfloat16") -> WeightFormat:
        """Return a float format."""
        return WeightFormat(str(dtype).removeprefix("torch."))

    @property
    def is_float(self) -> bool:
        """Whether the weight is stored as floats."""
        return self.dtype != "int"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype of a float weight's elements."""
        return _FLOATS[self.dtype]

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        """The torch dtype of a group's scales (integers, if they have two levels)."""
        return _INTEGERS[self.scale_dtype] if self.block_size else _FLOATS[self.scale_dtype]

    @property
    def torch_zero_dtype(self) -> torch.dtype:
        """The torch dtype of a group's minima or zero points."""
        return torch.uint8 if self.zero == "integer" or self.block_size else self.torch_scale_dtype

    @property
    def plane_bits(self) -> tuple[int, ...]:
        """Bits of the planes that a code is cut into, the low bits first."""
        return _PLANES[self.bits]

    @property
    def zero_point(self) -> int:
        """The zero point that all codes share ("none": 0, "constant": the middle)."""
        return 1 << (self.bits - 1) if self.zero == "constant" else 0

    def groups(self, k: int) -> int:
        """Return the number of groups of a row of `k` values: whole groups, and whole blocks."""
        if self.block_size:
            return self.blocks(k) * (self.block_size // self.group_size)
        return -(-k // self.group_size)

    def blocks(self, k: int) -> int:
        """Return the number of blocks of a row (0 without blocks)."""
        return -(-k // self.block_size) if self.block_size else 0

    def key(self) -> str:
        """One word that names the format."""
        if self.is_float:
            return self.dtype
        blocks = f"b{self.block_size}" if self.block_size else ""
        return f"int{self.bits}g{self.group_size}{self.zero}-{self.scale_dtype}{blocks}"


@dataclass(frozen=True)
class CanonicalWeight:
    """A weight [N, K] row by row: the form that files and state dicts hold.

    `codes` is uint8 [N, K] with one code a byte (int8 for zero="none"), or the float tensor itself;
    `scale` [N, groups]; `zero` [N, groups] is uint8 zero points or minima, or None. With scales in two
    levels both are integers, and `block_scale` and `block_zero` [N, blocks] their fp16 factors.
    """

    format: WeightFormat
    codes: torch.Tensor
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    block_scale: torch.Tensor | None = None
    block_zero: torch.Tensor | None = None

    @property
    def n(self) -> int:
        """Rows: output features."""
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        """Columns: input features."""
        return self.codes.shape[1]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that this format has, by name."""
        found = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def group_scales(self) -> torch.Tensor:
        """Return the scale of each group, fp32 [N, groups]."""
        assert self.scale is not None
        return self._scaled(self.scale, self.block_scale)

    def group_minima(self) -> torch.Tensor:
        """Return the minimum (or zero point) of each group, fp32 [N, groups]."""
        assert self.zero is not None
        return self._scaled(self.zero, self.block_zero)

    def _scaled(self, values: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
        if factors is None:
            return values.float()
        return values.float() * factors.float().repeat_interleave(
            self.format.block_size // self.format.group_size, 1
        )

    def dequantize(self) -> torch.Tensor:
        """Return the values, fp32 [N, K]."""
        fmt = self.format
        if fmt.is_float:
            return self.codes.float()
        spread = lambda t: t.repeat_interleave(fmt.group_size, 1)[:, : self.k]  # noqa: E731
        scale = spread(self.group_scales())
        if fmt.zero == "minimum":
            return self.codes.float() * scale + spread(self.group_minima())
        if fmt.zero == "integer":
            return (self.codes.float() - spread(self.group_minima())) * scale
        return (self.codes.float() - fmt.zero_point) * scale

    @staticmethod
    def from_float(weight: torch.Tensor, fmt: WeightFormat) -> CanonicalWeight:
        """Round a float weight [N, K] to `fmt` (round to nearest; absolute maximum or range per group)."""
        if fmt.is_float:
            return CanonicalWeight(fmt, weight.detach().to(fmt.torch_dtype).contiguous())
        n, k = weight.shape
        groups = fmt.groups(k)
        padded = torch.zeros(n, groups * fmt.group_size)
        padded[:, :k] = weight.detach().float()
        w = padded.view(n, groups, fmt.group_size)
        top = (1 << fmt.bits) - 1
        zero = block_zero = None
        if fmt.zero in ("none", "constant"):
            half = 1 << (fmt.bits - 1)
            largest = torch.gather(w, 2, w.abs().argmax(2, keepdim=True)).squeeze(2)
            # The value of largest magnitude maps to -half exactly for 4 bits, as GGUF's Q4_0 does.
            wanted = (w.abs().amax(2) / 127) if fmt.bits == 8 else largest / -half
            scale, block_scale, held = _round_scales(wanted, fmt, fmt.torch_scale_dtype)
            codes = (w * _inverse(held)).round()
            codes = codes.clamp(-127, 127) if fmt.bits == 8 else codes.clamp(-half, half - 1)
            codes = codes + (half if fmt.zero == "constant" else 0)
        else:
            low, high = w.amin(2).clamp(max=0), w.amax(2).clamp(min=0)
            scale, block_scale, held = _round_scales((high - low) / top, fmt, fmt.torch_scale_dtype)
            if fmt.zero == "minimum":
                zero, block_zero, low = _round_scales(low, fmt, fmt.torch_zero_dtype)
                codes = ((w - low.unsqueeze(2)) * _inverse(held)).round().clamp(0, top)
            else:
                point = (-low.unsqueeze(2) * _inverse(held)).round().clamp(0, top)
                codes = (w * _inverse(held) + point).round().clamp(0, top)
                zero = point.squeeze(2).to(torch.uint8)
        dtype = torch.int8 if fmt.zero == "none" else torch.uint8
        flat = codes.to(dtype).reshape(n, -1)[:, :k].contiguous()
        return CanonicalWeight(fmt, flat, scale, zero, block_scale, block_zero)

    @staticmethod
    def empty(fmt: WeightFormat, n: int, k: int) -> CanonicalWeight:
        """Return a weight on the meta device: shapes and types, no values."""
        row = _empty_row(fmt, k)
        return CanonicalWeight(
            fmt, **{name: torch.empty(n, columns, dtype=dtype, device="meta") for name, columns, dtype in row}
        )

    @staticmethod
    def cat(weights: list[CanonicalWeight]) -> CanonicalWeight:
        """Stack weights of one format along N."""
        formats = {w.format for w in weights}
        if len(formats) > 1:
            raise UnsupportedError(f"cannot stack weights of formats {sorted(f.key() for f in formats)}")
        if weights[0].codes.is_meta:
            return CanonicalWeight.empty(weights[0].format, sum(w.n for w in weights), weights[0].k)
        names = weights[0].tensors()
        return CanonicalWeight(
            weights[0].format, **{name: torch.cat([w.tensors()[name] for w in weights]) for name in names}
        )

    def rows(self, index: torch.Tensor | slice) -> CanonicalWeight:
        """Return some rows (a permutation or a slice), without loss."""
        return CanonicalWeight(self.format, **{name: t[index] for name, t in self.tensors().items()})

    def slice_rows(self, start: int, stop: int) -> CanonicalWeight:
        """Return rows [start, stop)."""
        return self.rows(slice(start, stop))


TENSORS = ("codes", "scale", "zero", "block_scale", "block_zero")


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale).unsqueeze(2)


def _round_scales(
    wanted: torch.Tensor, fmt: WeightFormat, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Round scales or minima [N, groups] to what the format holds; return (held, block factors, values)."""
    if not fmt.block_size:
        held = wanted.to(dtype)
        return held, None, held.float()
    n, per_block = wanted.shape[0], fmt.block_size // fmt.group_size
    blocks = wanted.view(n, -1, per_block)
    info = torch.iinfo(dtype)
    # Minima are negative: an unsigned integer times a negative factor.
    largest = blocks.amin(2) if (blocks <= 0).all() else blocks.abs().amax(2)
    factor = (largest / info.max).to(torch.float16)
    inverse = _inverse(factor.float())
    held = (blocks * inverse).round().clamp(info.min, info.max)
    values = held * factor.float().unsqueeze(2)
    return held.to(dtype).view(n, -1), factor, values.view(n, -1)


@functools.cache
def _empty_row(fmt: WeightFormat, k: int) -> list[tuple[str, int, torch.dtype]]:
    """Return (name, columns, dtype) of the tensors of a weight with rows of k values."""
    row = CanonicalWeight.from_float(torch.zeros(1, k), fmt)
    return [(name, tensor.shape[1], tensor.dtype) for name, tensor in row.tensors().items()]
