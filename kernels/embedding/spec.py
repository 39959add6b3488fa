"""The problem of the embedding operator: rows of a table that is stored as a packed weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...compiler.errors import EdgeFormerError, UnsupportedError
from ..quant_matmul.packing import Geometry, PackedWeight
from ..quant_matmul.weight_format import WeightFormat

TOLERANCE = {"float32": 1e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclass(frozen=True)
class EmbeddingSpec:
    """Look rows up in a table [n, k] of any WeightFormat, in the packed layout that the head shares.

    value = scale * (code - zero point), or scale * code + minimum, in fp32, times `factor`, rounded once to
    out_dtype.
    The number of ids is a run-time argument; ids are int64 in [0, n).
    """

    n: int
    k: int
    weight: WeightFormat
    layout: str
    out_dtype: str = "float32"
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.out_dtype not in TOLERANCE:
            raise UnsupportedError(f"embedding to {self.out_dtype}: known types are {', '.join(TOLERANCE)}")
        if not 0 < self.factor < math.inf:
            raise UnsupportedError(f"embedding times {self.factor}; the factor must be positive")
        if self.layout.endswith(".pair"):
            raise UnsupportedError("embedding reads plain tables: pack the weight without pair=True")

    @staticmethod
    def of(weight: PackedWeight, out_dtype: str = "float32", factor: float = 1.0) -> EmbeddingSpec:
        """Return the problem of looking rows of `weight` up."""
        return EmbeddingSpec(weight.n, weight.k, weight.format, weight.layout, out_dtype, factor)

    def key(self) -> str:
        """One line that names the problem completely; n bounds the ids but changes no code."""
        times = "" if self.factor == 1.0 else f" *{self.factor!r}"
        return f"embedding k={self.k} {self.weight.key()} {self.layout}{times} -> {self.out_dtype}"

    def bytes(self, rows: int) -> int:
        """Return the bytes that have to move for `rows` ids."""
        stored = Geometry(self.weight, self.k).block_bytes // 32
        return rows * (stored + self.k * (4 if self.out_dtype == "float32" else 2))


def check_ids(ids: torch.Tensor, n: int) -> None:
    """Raise EdgeFormerError unless all ids are int64 in [0, n)."""
    if ids.dtype != torch.int64:
        raise EdgeFormerError(f"embedding ids have to be int64, not {ids.dtype}")
    if ids.numel():
        low, high = torch.aminmax(ids)
        if low < 0 or high >= n:
            bad = int(low) if low < 0 else int(high)
            raise EdgeFormerError(
                f"token id {bad} is outside this table of {n} rows (0 to {n - 1}): "
                "the ids come from another tokenizer than the model's"
            )


def examples() -> list[EmbeddingSpec]:
    """Return problems of real models, for tests and tuning."""
    return [
        EmbeddingSpec(49152, 576, WeightFormat.int4(zero="minimum"), "n32.unsigned"),
        EmbeddingSpec(49152, 576, WeightFormat.int8(), "n32.unsigned"),
        EmbeddingSpec(128256, 2048, WeightFormat.float("bfloat16"), "n32.unsigned"),
    ]
