"""A GGUF file as a checkpoint: its config, its weights one at a time and without loss, its tokenizer data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...compiler.errors import FormatError, UnsupportedError
from ...kernels.quant_matmul import CanonicalWeight, WeightFormat
from .blocks import FORMATS, decode_blocks, type_rows
from .container import Container, TensorInfo
from .gguf_config import ARCHITECTURES, ROPE_TENSORS, config_from_gguf, tensor_of


def half_split_rows(num_heads: int, head_dim: int, rotary: int) -> torch.Tensor:
    """Row order that turns interleaved rotary pairs (2i, 2i+1) into half-split ones (i, i + rotary/2)."""
    head = torch.cat(
        [torch.arange(rotary).view(rotary // 2, 2).t().reshape(-1), torch.arange(rotary, head_dim)]
    )
    return (torch.arange(num_heads)[:, None] * head_dim + head).reshape(-1)


class GGUFCheckpoint:
    """Weights of a GGUF file under our names (``embed``, ``layers.3.q``, ``norm``, ...).

    Raises FormatError for a missing, damaged or inconsistent file, UnsupportedError for an
    architecture, option or tensor type that is not implemented.
    """

    def __init__(self, path: str | Path) -> None:
        self.container = Container(path)
        self.path = self.container.path
        self.metadata = self.container.metadata
        try:
            self.config = config_from_gguf(self.metadata, self.container.tensors, self._vector)
        except (FormatError, UnsupportedError) as error:
            if str(self.path) in str(error):
                raise
            raise type(error)(f"{self.path}: {error}") from error
        self._check_tensors()

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Our name -> (N, K) of every linear weight, in the order of the decoder."""
        return self.config.matrices()

    def _place(self, name: str) -> TensorInfo:
        """Where one of our weights lies: a tensor, or some rows of one."""
        file_name, rows = tensor_of(self.config, name, self.container.tensors)
        info = self.container.info(file_name)
        return info if rows is None else info.part(*rows)

    def _check_tensors(self) -> None:
        """Every expected tensor is there in its shape, and no other: ignoring one would be silently wrong."""
        if self.config.num_layers > len(self.container.tensors):
            raise FormatError(f"{self.path}: {self.config.num_layers} layers, but too few tensors for them")
        shapes: dict[str, tuple[int, ...]] = dict(self.config.matrices())
        shapes |= {name: (size,) for name, size in self.config.vectors().items()}
        expected: dict[str, int] = {}  # rows of each tensor
        for name, shape in shapes.items():
            file_name, rows = tensor_of(self.config, name, self.container.tensors)
            found = self.container.info(file_name).shape
            expected[file_name] = expected.get(file_name, 0) + shape[0]
            if found[1:] != shape[1:] or (rows is None and found != shape):
                raise FormatError(
                    f"{self.path}: the tensor {file_name!r} has the shape {found}, expected {shape}"
                )
        for file_name, rows in expected.items():
            found = self.container.info(file_name).shape[0]
            if found != rows:
                raise FormatError(f"{self.path}: the tensor {file_name!r} has {found} rows, expected {rows}")
        extra = sorted(set(self.container.tensors) - set(expected) - set(ROPE_TENSORS))
        if extra:
            names = ", ".join(extra[:3])
            raise UnsupportedError(
                f"{self.path}: {len(extra)} tensors have no place in this decoder: {names}"
            )

    def format(self, name: str) -> WeightFormat:
        """The format of a matrix, without reading it."""
        return FORMATS[self._place(name).type]

    def types(self) -> list[dict[str, Any]]:
        """One row for each type of the file's matrices: how it is held, and what that costs."""
        return type_rows(self.container.tensors.values())

    def weight(self, name: str) -> CanonicalWeight:
        """One matrix; queries and keys are put half-split by moving whole rows."""
        info = self._place(name)
        weight = decode_blocks(self.container.read_info(info), info)
        for values in weight.tensors().values():
            if values.is_floating_point():
                self._require_finite(info.name, values)
        part = name.rsplit(".", 1)[-1]
        return weight.rows(self._rotary_rows(part)) if self._moves(part) else weight

    def vector(self, name: str) -> torch.Tensor:
        """One norm weight or bias, float32."""
        part = name.rsplit(".", 1)[-1]
        values = self._vector(tensor_of(self.config, name, self.container.tensors)[0])
        return values[self._rotary_rows(part)] if self._moves(part) else values

    def _vector(self, file_name: str) -> torch.Tensor:
        info = self.container.info(file_name)
        fmt = FORMATS[info.type]
        if not fmt.is_float:
            raise UnsupportedError(
                f"{self.path}: the vector {file_name!r} has the type {info.type}, not a float"
            )
        values = torch.from_numpy(self.container.read(file_name)).view(fmt.torch_dtype).float()
        self._require_finite(file_name, values)
        return values

    def _moves(self, part: str) -> bool:
        return ARCHITECTURES[self.config.architecture].interleaved and part in ("q", "k", "q_bias", "k_bias")

    def _rotary_rows(self, part: str) -> torch.Tensor:
        c = self.config
        return half_split_rows(c.num_heads if part[0] == "q" else c.num_kv_heads, c.head_dim, c.rotary)

    def _require_finite(self, name: str, values: torch.Tensor) -> None:
        if not torch.isfinite(values).all():
            raise FormatError(f"{self.path}: the tensor {name!r} holds NaN or Inf; the file is damaged")
