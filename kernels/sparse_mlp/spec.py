"""The problem of the sparse gated MLP: blocks of neurons that do not fire are neither read nor computed."""

from __future__ import annotations

from dataclasses import dataclass

from ...compiler.errors import UnsupportedError
from ..quant_matmul.packing import BLOCK, Geometry
from ..quant_matmul.spec import QuantMatmulSpec
from ..quant_matmul.weight_format import WeightFormat

ACTIVATIONS = ("silu", "relu", "gelu_tanh")
SELECTIONS = ("threshold", "indices")


@dataclass(frozen=True)
class SparseMlpSpec:
    """y = down(h), h = act(gate(x)) * up(x) in the active blocks of neurons of each row, 0 elsewhere.

    x [M, K] in `x_dtype`, y [M, K] in the same; `gate_up` is the packed pair [2 F, K] (gate rows, then up
    rows), `down` the packed [K, F]; K `hidden`, F `neurons`. Neurons are skipped in blocks of `block` (32, or
    the group of the down weight if that is larger).

    `select` "threshold" (CATS, arXiv 2404.08763, by blocks): a block of a row is active if one of its
    |act(gate)| is >= the run-time threshold; the gate of every neuron is computed first, then up and down
    of the blocks that are active in some row. "indices": int32 [n] names the active blocks of all rows
    (a predictor's choice, ascending and without repetition); nothing else is read.
    `arithmetic` "int8" and "float" as the activation of QuantMatmulSpec: x and h are quantised by groups of
    their weight's size, h after the mask.
    """

    hidden: int
    neurons: int
    gate_up: WeightFormat
    down: WeightFormat
    activation: str = "silu"
    select: str = "threshold"
    arithmetic: str = "int8"
    x_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.neurons < 1:
            raise UnsupportedError(f"an MLP of {self.neurons} neurons on {self.hidden} inputs")
        if self.activation not in ACTIVATIONS:
            raise UnsupportedError(
                f"activation {self.activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}"
            )
        if self.select not in SELECTIONS:
            raise UnsupportedError(f"selection {self.select!r} is unknown; use {' or '.join(SELECTIONS)}")
        if self.arithmetic not in ("int8", "float"):
            raise UnsupportedError(f"arithmetic {self.arithmetic!r} is unknown; use int8 or float")
        if self.x_dtype not in ("float32", "bfloat16", "float16"):
            raise UnsupportedError(f"activations of type {self.x_dtype} are not supported; use a float type")
        if self.neurons % self.block:
            raise UnsupportedError(f"{self.neurons} neurons are not whole blocks of {self.block}")

    def key(self) -> str:
        """One line that names the problem."""
        return (
            f"{self.hidden}/{self.neurons} {self.gate_up.key()} {self.down.key()} {self.activation} "
            f"{self.select} {self.arithmetic} {self.x_dtype}"
        )

    @property
    def block(self) -> int:
        """Neurons that are skipped together: whole groups of down, whole blocks of gate and up."""
        return max(BLOCK, self.down.group_size)

    @property
    def blocks(self) -> int:
        """Blocks of neurons."""
        return self.neurons // self.block

    @property
    def tolerance(self) -> float:
        """The relative error (L2) that a form may have: fp32 sums, and the rounding of the output's type."""
        return {"float32": 1e-5, "bfloat16": 2.0**-8 + 1e-5, "float16": 2.0**-11 + 1e-5}[self.x_dtype]

    def products(self) -> tuple[QuantMatmulSpec, QuantMatmulSpec]:
        """Return the problems of the gate and up pair and of down, as `quant_matmul` states them."""
        pair = QuantMatmulSpec(
            2 * self.neurons, self.hidden, self.gate_up, self.arithmetic, self.x_dtype, "silu_pair"
        )
        return pair, QuantMatmulSpec(self.hidden, self.neurons, self.down, self.arithmetic, self.x_dtype)

    def weight_bytes(self, active: int | None = None) -> int:
        """Bytes of the weights that one pass with `active` active blocks (default: all) reads."""
        active = self.blocks if active is None else active
        part = self.block // BLOCK * Geometry(self.gate_up, self.hidden).block_bytes
        row_blocks, down = -(-self.hidden // BLOCK), Geometry(self.down, self.neurons)
        group = row_blocks * down.block_bytes // self.blocks
        gates = self.blocks if self.select == "threshold" else active
        return gates * part + active * (part + group)

    def operations(self, rows: int, active: int | None = None) -> int:
        """Multiplications and additions for `rows` rows with `active` active blocks."""
        active = self.blocks if active is None else active
        gates = self.blocks if self.select == "threshold" else active
        return 2 * rows * self.hidden * self.block * (gates + 2 * active)


def examples() -> list[SparseMlpSpec]:
    """Return example problems: a 1B model's MLP, groups of 128, a ReLU MLP with a predictor."""
    int4 = WeightFormat.int4()
    return [
        SparseMlpSpec(2048, 8192, int4, int4),
        SparseMlpSpec(2048, 8192, WeightFormat.int4(128), WeightFormat.int4(128), select="indices"),
        SparseMlpSpec(576, 1536, WeightFormat.int8(), WeightFormat.int8(), "relu", x_dtype="bfloat16"),
    ]
