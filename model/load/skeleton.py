"""A checkpoint's shapes and formats without its values: enough to build a decoder for packed weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ...compiler.errors import FormatError
from ...kernels.quant_matmul import CanonicalWeight, WeightFormat
from ..config import ModelConfig
from .config_json import format_from_json


class RecordingCheckpoint:
    """Hands a checkpoint's weights on and remembers the shape and format of each."""

    def __init__(self, checkpoint: Any) -> None:
        self._checkpoint = checkpoint
        self.config: ModelConfig = checkpoint.config
        self.record: dict[str, Any] = {"formats": [], "weights": {}, "vectors": {}}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def weight(self, name: str) -> CanonicalWeight:
        """One matrix."""
        found = self._checkpoint.weight(name)
        fmt, formats = dataclasses.asdict(found.format), self.record["formats"]
        if fmt not in formats:
            formats.append(fmt)
        self.record["weights"][name] = [formats.index(fmt), found.n, found.k]
        return found

    def vector(self, name: str) -> Tensor:
        """One norm weight or bias."""
        found = self._checkpoint.vector(name)
        self.record["vectors"][name] = list(found.shape)
        return found


class SkeletonCheckpoint:
    """Matrices on the meta device and vectors of zeros, by the record of a RecordingCheckpoint.

    Raises FormatError for a damaged record.
    """

    def __init__(self, record: dict[str, Any], config: ModelConfig, source: Any) -> None:
        self.config, self._source = config, source
        try:
            self._formats = [format_from_json(fmt, source) for fmt in record["formats"]]
            self._weights = {name: _sizes(row, 3) for name, row in record["weights"].items()}
            self._vectors = {name: _sizes(shape, len(shape)) for name, shape in record["vectors"].items()}
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise FormatError(f"{source}: the table of weights is damaged") from error

    def weight(self, name: str) -> CanonicalWeight:
        """One matrix on the meta device."""
        number, n, k = self._row(self._weights, name)
        if number >= len(self._formats):
            raise FormatError(f"{self._source}: the table of weights is damaged at {name!r}")
        return CanonicalWeight.empty(self._formats[number], n, k)

    def format(self, name: str) -> WeightFormat:
        """The format of a matrix."""
        return self.weight(name).format

    def vector(self, name: str) -> Tensor:
        """A norm weight or bias of zeros, small enough to be real."""
        return torch.zeros(self._row(self._vectors, name))

    def _row(self, table: dict[str, Any], name: str) -> Any:
        if name not in table:
            raise FormatError(
                f"{self._source}: the table of weights has no {name!r}; compile the model again"
            )
        return table[name]


def _sizes(values: Any, count: int) -> tuple[int, ...]:
    found = tuple(values)
    if len(found) != count or not all(type(v) is int and 0 <= v < 1 << 20 for v in found):
        raise ValueError(f"{values!r} are no sizes")
    return found
