"""A folder of `edgeformer quantize`: canonical weights in safetensors, configuration in config.json."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...compiler.errors import FormatError, UnsupportedError
from ...kernels.quant_matmul import CanonicalWeight, WeightFormat
from .config_json import config_from_json, format_from_json
from .json_file import read_object
from .saved_tokenizer import VOCABULARY, read_saved
from .tensors import TensorFolder
from .tokenizer import ModelTokenizer

CONFIG = "config.json"
MODEL_TYPE = "edgeformer"
SCHEMA = 1
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8",
          torch.int8: "I8"}  # fmt: skip


def stored(weight: CanonicalWeight) -> dict[str, Tensor]:
    """The tensors of a weight as a file holds them: codes of 2 and 4 bits share a byte, low bits first."""
    found = weight.tensors()
    if weight.format.bits in (2, 4):
        count = 8 // weight.format.bits
        padded = torch.zeros(weight.n, -(-weight.k // count) * count, dtype=torch.uint8)
        padded[:, : weight.k] = weight.codes
        parts = padded.view(weight.n, -1, count)
        codes = torch.zeros(parts.shape[:2], dtype=torch.uint8)
        for i in range(count):
            codes |= parts[:, :, i] << (i * weight.format.bits)
        found["codes"] = codes
    return {name: tensor.contiguous() for name, tensor in found.items()}


def restored(fmt: WeightFormat, k: int, tensors: dict[str, Tensor]) -> CanonicalWeight:
    """The inverse of ``stored``."""
    if fmt.bits in (2, 4):
        mask, codes = (1 << fmt.bits) - 1, tensors["codes"]
        parts = [(codes >> (i * fmt.bits)) & mask for i in range(8 // fmt.bits)]
        tensors["codes"] = torch.stack(parts, 2).reshape(len(codes), -1)[:, :k].contiguous()
    return CanonicalWeight(fmt, **tensors)


class QuantizedCheckpoint:
    """Weights of a quantised folder.

    Raises FormatError for a damaged one, UnsupportedError for another schema.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        data = read_object(folder / CONFIG)
        if data.get("schema") != SCHEMA:
            raise UnsupportedError(f"{folder / CONFIG} has the schema {data.get('schema')!r}, not {SCHEMA}")
        self.config = config_from_json(data.get("config"), folder)
        self._formats = self._read_formats(data)
        self.files = TensorFolder(folder)
        self._check_tensors()
        template = data.get("chat_template")
        self.metadata: dict[str, Any] = {"tokenizer.chat_template": template}

    def _read_formats(self, data: dict[str, Any]) -> dict[str, WeightFormat]:
        try:
            formats = [format_from_json(entry, self.path / CONFIG) for entry in data["formats"]]
            table = {name: formats[number] for name, number in data["weights"].items()}
        except (TypeError, KeyError, IndexError, AttributeError) as error:
            raise FormatError(f"{self.path / CONFIG}: the table of weights is damaged") from error
        if table.keys() != self.config.matrices().keys():
            raise FormatError(f"{self.path / CONFIG}: the table of weights is not the configuration's")
        return table

    def _check_tensors(self) -> None:
        """The files hold exactly the tensors that the formats make, in their shapes and types."""
        expected: dict[str, tuple[tuple[int, ...], str]] = {}
        for name, (n, k) in self.config.matrices().items():
            fmt, codes = self._formats[name], f"{name}.codes"
            per_byte = 8 // fmt.bits if fmt.bits in (2, 4) else 1
            shape = self.files.shapes.get(codes)
            if shape != (n, -(-k // per_byte)):  # first: what follows takes memory for one row
                raise FormatError(f"{self.path}: the tensor {codes!r} has the shape {shape}")
            empty = CanonicalWeight.empty(fmt, n, k)
            for part, tensor in empty.tensors().items():
                columns = -(-k // per_byte) if part == "codes" else tensor.shape[1]
                expected[f"{name}.{part}"] = ((n, columns), _NAMES[tensor.dtype])
        expected |= {name: ((size,), "F32") for name, size in self.config.vectors().items()}
        found = {name: (shape, self.files.types[name]) for name, shape in self.files.shapes.items()}
        if found != expected:
            names = found.keys() | expected.keys()
            wrong = min(name for name in names if found.get(name) != expected.get(name))
            raise FormatError(
                f"{self.path}: the tensor {wrong[:80]!r} is {found.get(wrong)}, not {expected.get(wrong)}"
            )

    @property
    def tokenizer(self) -> Any:
        """A function that reads the tokenizer; None where the folder has none."""
        return self._tokenizer if (self.path / VOCABULARY).exists() else None

    def _tokenizer(self) -> ModelTokenizer:
        return read_saved(self.path)

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Our name -> (N, K) of every linear weight."""
        return self.config.matrices()

    def format(self, name: str) -> WeightFormat:
        """The format of a matrix, without reading it."""
        return self._formats[name]

    def weight(self, name: str) -> CanonicalWeight:
        """One matrix."""
        fmt = self._formats[name]
        parts = CanonicalWeight.empty(fmt, 1, self.config.matrices()[name][1]).tensors()
        tensors = {part: self.files.read(f"{name}.{part}") for part in parts}
        for tensor in tensors.values():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise FormatError(f"{self.path}: the weight {name!r} holds NaN or Inf; the file is damaged")
        return restored(fmt, self.config.matrices()[name][1], tensors)

    def vector(self, name: str) -> Tensor:
        """One norm weight or bias, float32."""
        found = self.files.read(name)
        if not torch.isfinite(found).all():
            raise FormatError(f"{self.path}: the tensor {name!r} holds NaN or Inf; the file is damaged")
        return found


def describe(
    config: Any, formats: dict[str, WeightFormat], profile: str, template: str | None
) -> dict[str, Any]:
    """What config.json says of a quantised folder."""
    distinct = list(dict.fromkeys(formats.values()))
    return {
        "model_type": MODEL_TYPE,
        "schema": SCHEMA,
        "profile": profile,
        "config": dataclasses.asdict(config),
        "formats": [dataclasses.asdict(fmt) for fmt in distinct],
        "weights": {name: distinct.index(fmt) for name, fmt in formats.items()},
        "chat_template": template,
    }
