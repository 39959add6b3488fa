"""A Hugging Face folder (config.json, safetensors, tokenizer.json) as a checkpoint."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ...compiler.errors import FormatError, UnsupportedError
from ...kernels.quant_matmul import WeightFormat
from .hf_config import FAMILIES
from .hf_names import TensorCheckpoint, config_from_hf
from .hf_tokenizer import read_chat_template, read_tokenizer
from .json_file import read_object
from .tensors import DTYPES, TensorFolder
from .tokenizer import ModelTokenizer

CONFIG = "config.json"


class HFCheckpoint(TensorCheckpoint):
    """Weights of a Hugging Face folder under our names, in the file's precision, one tensor at a time.

    Nothing of the folder is ever run: code that config.json names (auto_map) and pickles are not read.
    Raises FormatError for damaged or inconsistent files, UnsupportedError for what no layer implements.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        data = read_object(folder / CONFIG)
        _refuse_code(folder, data)
        try:
            config = config_from_hf(data)
            self.files = TensorFolder(folder)
            super().__init__(config, self.files.read, self.files.shapes)
        except (FormatError, UnsupportedError) as error:
            if str(folder) in str(error):
                raise
            raise type(error)(f"{folder}: {error}") from error
        self._check_tensors()
        template = read_chat_template(folder)
        self.metadata: dict[str, Any] = {"tokenizer.chat_template": template}

    @property
    def tokenizer(self) -> Any:
        """A function that reads the tokenizer; None where the folder has none."""
        return self._tokenizer if (self.path / "tokenizer.json").exists() else None

    def _tokenizer(self) -> ModelTokenizer:
        return read_tokenizer(self.path, self.config.eos_token_ids)

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Our name -> (N, K) of every linear weight, in the order of the decoder."""
        return self.config.matrices()

    def format(self, name: str) -> WeightFormat:
        """The format of a matrix, without reading it."""
        return WeightFormat.float(DTYPES[self.files.types[self.sources[name].name]])

    def _check_tensors(self) -> None:
        """Every tensor has a type and a shape that fit, before any of them is read."""
        shapes: dict[str, tuple[int, ...]] = dict(self.config.matrices())
        shapes |= {name: (size,) for name, size in self.config.vectors().items()}
        for name, shape in shapes.items():
            source = self.sources[name]
            found, type_name = self.files.shapes[source.name], self.files.types[source.name]
            rows = shape[0] if source.rows is None else source.rows[2]
            if found != (rows, *shape[1:]):
                raise FormatError(
                    f"{self.path}: the tensor {source.name!r} has the shape {found}, "
                    f"expected {(rows, *shape[1:])}"
                )
            if type_name not in DTYPES:
                raise UnsupportedError(
                    f"{self.path}: the tensor {source.name!r} has the type {type_name}; "
                    f"supported: {', '.join(DTYPES)}"
                )


def _refuse_code(folder: Path, config: dict[str, Any]) -> None:
    """Say that a folder's own code is not run, and refuse a model that needs it."""
    kind = config.get("model_type")
    known = isinstance(kind, str) and kind in {*FAMILIES, "gemma3"}
    if config.get("auto_map"):
        if not known:
            raise UnsupportedError(
                f"{folder}: the model type {kind!r} brings its own Python code (auto_map), which is never run"
            )
        warnings.warn(
            f"{folder} names Python code of its own (auto_map); it is not run, EdgeFormer's {kind} is used",
            RuntimeWarning,
            stacklevel=4,
        )
    quantised = config.get("quantization_config")
    if known and quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise UnsupportedError(
            f"{folder}: weights quantised by {method!r} are not read; take the unquantised model and "
            "`edgeformer quantize` it"
        )
