"""The problem of the rope operator: rotary position embedding."""

from __future__ import annotations

from dataclasses import dataclass

from ...compiler.errors import UnsupportedError

FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TOLERANCE = {"float32": 1e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclass(frozen=True)
class RopeSpec:
    """Rotate pairs of elements of heads of `head_dim` by the angle of their position.

    Su et al. 2021. Pairs are (i, i + rotary_dim/2) in the half-split order (GPT-NeoX, Hugging Face), or
    (2i, 2i + 1) when interleaved (GPT-J, llama.cpp's Llama files). Elements from rotary_dim on are
    copied. Arithmetic is fp32, rounded once. Sizes and strides of x [B, H, T, D] are run-time arguments.
    """

    head_dim: int
    rotary_dim: int = 0  # 0 is head_dim
    interleaved: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not self.rotary_dim:
            object.__setattr__(self, "rotary_dim", self.head_dim)
        if self.dtype not in FLOAT_BYTES:
            raise UnsupportedError(f"rope of {self.dtype}: known types are {', '.join(FLOAT_BYTES)}")
        if self.rotary_dim < 2 or self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise UnsupportedError(
                f"rope over {self.rotary_dim} of {self.head_dim} elements: needs an even number <= head_dim"
            )

    def key(self) -> str:
        """One line that names the problem completely."""
        order = "interleaved" if self.interleaved else "half"
        return f"rope {self.rotary_dim} of {self.head_dim} {order} {self.dtype}"

    def flops(self, rows: int) -> int:
        """Return the floating-point operations of `rows` heads."""
        return 3 * rows * self.rotary_dim

    def bytes(self, rows: int) -> int:
        """Return the bytes that have to move for `rows` heads (tables not counted)."""
        return 2 * rows * self.head_dim * FLOAT_BYTES[self.dtype]


def examples() -> list[RopeSpec]:
    """Return problems of real models, for tests and tuning."""
    return [
        RopeSpec(64),
        RopeSpec(64, interleaved=True),
        RopeSpec(128, 64, dtype="bfloat16"),
        RopeSpec(80, 32),
    ]
