"""The quantised matmul's problem: y = epilogue(x @ W.T), W in any WeightFormat."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...compiler.errors import UnsupportedError
from .packing import Geometry
from .weight_format import WeightFormat

EPILOGUES = ("none", "silu_pair", "gelu_pair")
SMALLEST = 2.0**-120  # a group of activations whose absolute maximum is below counts as zero


@dataclass(frozen=True)
class QuantMatmulSpec:
    """x [M, K] (`x_dtype`), W [N, K], y [M, N] in x's dtype; M is a run-time size.

    `activation` "int8" quantises x dynamically: symmetric, absmax/127 for each row and group of the
    weight's size, round half to even; the products of a group are summed exactly. "bfloat16" rounds x and
    the weight's values to bf16 and accumulates in fp32; "float" keeps both.
    `epilogue` "silu_pair" gives silu(gate) * up [M, N/2] of a weight packed as a pair, "gelu_pair" the same
    with the tanh form of GELU (Hendrycks and Gimpel 2016). Bias [N] is fp32 and is added before the
    epilogue, the residual [M, N] (x's dtype) after it. A `softcap` c > 0 makes c * tanh(y / c) of each
    result before the residual.
    """

    n: int
    k: int
    weight: WeightFormat
    activation: str = "int8"
    x_dtype: str = "float32"
    epilogue: str = "none"
    bias: bool = False
    residual: bool = False
    softcap: float = 0.0

    def __post_init__(self) -> None:
        if self.n < 1 or self.k < 1:
            raise UnsupportedError(f"a weight of shape {self.n} x {self.k} has nothing to multiply")
        if self.activation not in ("int8", "bfloat16", "float") or self.epilogue not in EPILOGUES:
            raise UnsupportedError(f"unknown activation {self.activation!r} or epilogue {self.epilogue!r}")
        if not 0 <= self.softcap < math.inf:
            raise UnsupportedError(f"a softcap of {self.softcap}; it must be positive, or 0 for none")
        if self.x_dtype not in ("float32", "bfloat16", "float16"):
            raise UnsupportedError(f"activations of type {self.x_dtype} are not supported; use a float type")

    def key(self) -> str:
        """One line that names the problem."""
        extras = f"{'+bias' if self.bias else ''}{'+residual' if self.residual else ''}"
        if self.softcap:
            extras += f"+softcap={self.softcap!r}"
        return (
            f"{self.n}x{self.k} {self.weight.key()} {self.activation} {self.x_dtype} {self.epilogue}{extras}"
        )

    @property
    def pair(self) -> bool:
        """Whether the weight is a gate and an up projection, packed as a pair."""
        return self.epilogue.endswith("_pair")

    @property
    def n_out(self) -> int:
        """Columns of y."""
        return self.n // 2 if self.pair else self.n

    def operations(self, m: int) -> int:
        """Multiplications and additions for M rows."""
        return 2 * m * self.n * self.k

    def weight_bytes(self) -> int:
        """Bytes of W that one pass reads."""
        return -(-self.n // 32) * Geometry(self.weight, self.k).block_bytes
