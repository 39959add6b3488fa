"""The problem of the norm operator: RMSNorm and LayerNorm, with and without quantising the output."""

from __future__ import annotations

from dataclasses import dataclass

from ...compiler.errors import UnsupportedError

FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
KINDS = ("rms", "layer")
TOLERANCE = {"float32": 1e-5, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclass(frozen=True)
class NormSpec:
    """Normalise rows of `dim` elements; the number of rows and their stride are run-time arguments.

    kind "rms": y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset), Zhang and Sennrich 2019;
    kind "layer": y = (x - mean) / sqrt(variance + eps) * (weight + weight_offset), Ba et al. 2016;
    plus the bias where there is one. Gemma's weights need weight_offset=1. Arithmetic is fp32
    throughout, rounded once at the end. With `residual` an x-like tensor is added to the fp32 result before
    that. With group_size > 0 the fp32 result is not stored but
    quantised to int8: symmetric, absmax/127 per (row, group), the last group may be shorter.
    """

    kind: str
    dim: int
    eps: float
    dtype: str = "float32"
    weight_dtype: str = "float32"
    out_dtype: str = ""  # "" is dtype; ignored when the output is quantised
    weight_offset: float = 0.0
    bias: bool = False
    group_size: int = 0
    residual: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnsupportedError(f"norm kind {self.kind!r}: known kinds are {', '.join(KINDS)}")
        if not self.out_dtype:
            object.__setattr__(self, "out_dtype", self.dtype)
        for dtype in (self.dtype, self.weight_dtype, self.out_dtype):
            if dtype not in FLOAT_BYTES:
                raise UnsupportedError(f"norm of {dtype}: known types are {', '.join(FLOAT_BYTES)}")
        if self.dim < 1 or self.group_size < 0:
            raise UnsupportedError(f"norm over {self.dim} elements in groups of {self.group_size}")

        if self.residual and self.group_size:
            raise UnsupportedError("a norm that quantises its output takes no residual")

    @property
    def groups(self) -> int:
        """Return the number of quantised groups in a row (0 when the output is float)."""
        return -(-self.dim // self.group_size) if self.group_size else 0

    def key(self) -> str:
        """One line that names the problem completely."""
        out = f"int8/{self.group_size}" if self.group_size else self.out_dtype
        options = f"eps={self.eps!r} offset={self.weight_offset!r} bias={self.bias}"
        options += " +residual" if self.residual else ""
        return f"norm {self.kind} dim={self.dim} {options} {self.dtype}*{self.weight_dtype}->{out}"

    def flops(self, rows: int) -> int:
        """Return the floating-point operations of `rows` rows."""
        return rows * self.dim * (4 if self.kind == "rms" else 6)

    def bytes(self, rows: int) -> int:
        """Return the bytes that have to move for `rows` rows."""
        weights = self.dim * FLOAT_BYTES[self.weight_dtype] * (2 if self.bias else 1)
        out = self.dim + 8 * self.groups if self.group_size else self.dim * FLOAT_BYTES[self.out_dtype]
        read = self.dim * FLOAT_BYTES[self.dtype] * (2 if self.residual else 1)
        return weights + rows * (read + out)


def examples() -> list[NormSpec]:
    """Return problems of real models and odd sizes, for tests and tuning."""
    return [
        NormSpec("rms", 576, 1e-5),
        NormSpec("rms", 576, 1e-5, group_size=32),
        NormSpec(
            "rms", 2048, 1e-6, dtype="bfloat16", weight_dtype="bfloat16", weight_offset=1.0, group_size=128
        ),
        NormSpec("layer", 768, 1e-5, bias=True),
        NormSpec("rms", 2304, 1e-6, residual=True),
    ]
