"""WeightFormat and CanonicalWeight: what a weight means, apart from how a kernel wants it laid out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...compiler.errors import UnsupportedError

_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class WeightFormat:
    """How numbers stand for a weight; knows no layout.

    Integer weights hold `bits`-bit codes in groups of `group_size` along K, each group with a scale:
    value = scale * (code - z), where z is 0 for zero="none" (signed codes), 2**(bits-1) for "constant",
    a stored integer for "integer"; for "minimum" value = scale * code + minimum.
    Float weights have dtype "float32", "bfloat16" or "float16" and bits 0.
    """

    dtype: str
    bits: int = 0
    group_size: int = 0
    scale_dtype: str = "float16"
    zero: str = "none"

    def __post_init__(self) -> None:
        if self.dtype in _FLOATS:
            if self.bits or self.group_size:
                raise UnsupportedError(f"a {self.dtype} weight has neither bits nor groups")
            return
        if self.dtype != "int" or self.bits not in (2, 4, 8):
            raise UnsupportedError(
                f"no weight format with dtype {self.dtype!r} and {self.bits} bits; bits: 2, 4, 8"
            )
        if self.group_size not in (32, 64, 128):
            raise UnsupportedError(f"group size {self.group_size} is not one of 32, 64, 128")
        if self.zero not in ("none", "constant", "integer", "minimum") or self.scale_dtype not in _FLOATS:
            raise UnsupportedError(f"unknown zero {self.zero!r} or scale type {self.scale_dtype!r}")
        if self.zero == "none" and self.bits != 8:
            raise UnsupportedError("signed codes are stored for 8 bits only; use zero='constant'")

    @staticmethod
    def int4(group_size: int = 32, zero: str = "constant", scale_dtype: str = "float16") -> WeightFormat:
        """Return a 4-bit format (GGUF: Q4_0 is constant, Q4_1 is minimum, both in groups of 32)."""
        return WeightFormat("int", 4, group_size, scale_dtype, zero)

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
        """The torch dtype of scales and minima."""
        return _FLOATS[self.scale_dtype]

    @property
    def zero_point(self) -> int:
        """The zero point that all codes share ("none": 0, "constant": the middle)."""
        return 1 << (self.bits - 1) if self.zero == "constant" else 0

    def groups(self, k: int) -> int:
        """Return the number of groups of a row of `k` values (the last one may be short)."""
        return -(-k // self.group_size)

    def key(self) -> str:
        """One word that names the format."""
        if self.is_float:
            return self.dtype
        return f"int{self.bits}g{self.group_size}{self.zero}-{self.scale_dtype}"


@dataclass(frozen=True)
class CanonicalWeight:
    """A weight [N, K] row by row: the form that files and state dicts hold.

    `codes` is uint8 [N, K] with one code a byte (int8 for zero="none"), or the float tensor itself;
    `scale` [N, groups]; `zero` [N, groups] is uint8 zero points or minima, or None.
    """

    format: WeightFormat
    codes: torch.Tensor
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None

    @property
    def n(self) -> int:
        """Rows: output features."""
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        """Columns: input features."""
        return self.codes.shape[1]

    def dequantize(self) -> torch.Tensor:
        """Return the values, fp32 [N, K]."""
        fmt = self.format
        if fmt.is_float:
            return self.codes.float()
        assert self.scale is not None
        spread = lambda t: t.repeat_interleave(fmt.group_size, 1)[:, : self.k]  # noqa: E731
        scale = spread(self.scale.float())
        if fmt.zero == "minimum":
            assert self.zero is not None
            return self.codes.float() * scale + spread(self.zero.float())
        if fmt.zero == "integer":
            assert self.zero is not None
            return (self.codes.float() - spread(self.zero.float())) * scale
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
        if fmt.zero in ("none", "constant"):
            half = 1 << (fmt.bits - 1)
            largest = torch.gather(w, 2, w.abs().argmax(2, keepdim=True))
            # The value of largest magnitude maps to -half exactly for 4 bits, as GGUF's Q4_0 does.
            scale = (w.abs().amax(2, keepdim=True) / 127) if fmt.bits == 8 else largest / -half
            scale = scale.to(fmt.torch_scale_dtype).float()
            inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
            codes = (w * inverse).round()
            codes = codes.clamp(-127, 127) if fmt.bits == 8 else codes.clamp(-half, half - 1)
            codes = codes + (half if fmt.zero == "constant" else 0)
            zero = None
        else:
            low, high = w.amin(2, keepdim=True).clamp(max=0), w.amax(2, keepdim=True).clamp(min=0)
            scale = ((high - low) / top).to(fmt.torch_scale_dtype).float()
            inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
            if fmt.zero == "minimum":
                low = low.to(fmt.torch_scale_dtype).float()
                codes, zero = (
                    ((w - low) * inverse).round().clamp(0, top),
                    low.squeeze(2).to(fmt.torch_scale_dtype),
                )
            else:
                point = (-low * inverse).round().clamp(0, top)
                codes, zero = (w * inverse + point).round().clamp(0, top), point.squeeze(2).to(torch.uint8)
        dtype = torch.int8 if fmt.zero == "none" else torch.uint8
        flat = codes.to(dtype).reshape(n, -1)[:, :k].contiguous()
        return CanonicalWeight(fmt, flat, scale.squeeze(2).to(fmt.torch_scale_dtype), zero)

    @staticmethod
    def cat(weights: list[CanonicalWeight]) -> CanonicalWeight:
        """Stack weights of one format along N."""
        formats = {w.format for w in weights}
        if len(formats) > 1:
            raise UnsupportedError(f"cannot stack weights of formats {sorted(f.key() for f in formats)}")
        join = lambda ts: None if ts[0] is None else torch.cat(ts)  # noqa: E731
        return CanonicalWeight(
            weights[0].format,
            torch.cat([w.codes for w in weights]),
            join([w.scale for w in weights]),
            join([w.zero for w in weights]),
        )

    def rows(self, index: torch.Tensor | slice) -> CanonicalWeight:
        """Return some rows (a permutation or a slice), without loss."""
        pick = lambda t: None if t is None else t[index]  # noqa: E731
        return CanonicalWeight(self.format, self.codes[index], pick(self.scale), pick(self.zero))

    def slice_rows(self, start: int, stop: int) -> CanonicalWeight:
        """Return rows [start, stop)."""
        return self.rows(slice(start, stop))
