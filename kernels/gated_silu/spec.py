"""The problem of the gated SiLU: silu(gate) * up, element by element."""

from __future__ import annotations

from dataclasses import dataclass

from ...compiler.errors import UnsupportedError


@dataclass(frozen=True)
class GatedSiluSpec:
    """gate, up and y are [..., F] of one float type; fp32 inside, rounded once. Sizes are run-time
    arguments.
    """

    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise UnsupportedError(f"gated SiLU of {self.dtype}; use a float type")

    def key(self) -> str:
        """One line that names the problem."""
        return f"gated_silu {self.dtype}"
