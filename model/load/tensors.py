"""Tensors of a folder: `model.safetensors`, or the shards that `model.safetensors.index.json` names."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import torch

from ...compiler.errors import FormatError, UnsupportedError
from .json_file import read_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
MAX_TENSORS = 65535
MAX_HEADER = 4 << 20  # bytes; a thousand tensors take some 120,000
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class TensorFolder:
    """Names, shapes and types of a folder's tensors; `read` reads one, by copy.

    Raises FormatError for a missing, damaged or inconsistent file, UnsupportedError for a folder that holds
    pickles only: reading one runs code.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        wanted = self._index()
        for file in sorted(set(wanted.values())) if wanted else [SINGLE]:
            self._read_header(folder / file)
        for name, file in wanted.items():
            if self._files.get(name) != folder / file:
                raise FormatError(f"{folder}: {file} has no tensor {name[:80]!r}, which {INDEX} promises")

    def _index(self) -> dict[str, str]:
        """Return the file of every tensor by the index, {} for a single file."""
        if not (self.folder / INDEX).exists():
            if not (self.folder / SINGLE).exists():
                self._refuse()
            return {}
        table = read_object(self.folder / INDEX).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise FormatError(f"{self.folder / INDEX} has no weight_map")
        for name, file in table.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise FormatError(f"{self.folder / INDEX}: {name[:80]!r} lies in {str(file)[:80]!r}")
        return table

    def _refuse(self) -> None:
        for pattern in _PICKLES:
            for file in sorted(self.folder.glob(pattern)):
                raise UnsupportedError(
                    f"{self.folder} holds its weights as a pickle ({file.name}), and reading one runs code; "
                    "convert it to safetensors first"
                )
        raise FormatError(f"{self.folder} has neither {SINGLE} nor {INDEX}")

    def _read_header(self, path: Path) -> None:
        with _open(path) as file:
            try:
                names = list(file.keys())
                if len(names) > MAX_TENSORS:
                    raise FormatError(f"{path}: {len(names)} tensors are not believed")
                parts = {name: file.get_slice(name) for name in names}
                found = {name: (tuple(p.get_shape()), str(p.get_dtype())) for name, p in parts.items()}
                self.metadata |= file.metadata() or {}
            except FormatError:
                raise
            except Exception as error:  # safetensors raises its own and plain ones
                raise FormatError(f"{path} is damaged: {str(error)[:200]}") from error
        for name, (shape, type_name) in found.items():
            if name in self._files:
                raise FormatError(f"{path}: the tensor {name[:80]!r} lies in another file too")
            self._files[name], self.shapes[name], self.types[name] = path, shape, type_name

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor. The file is opened anew, so that its pages leave the process with the tensor."""
        with _open(self._files[name]) as file:
            try:
                return file.get_tensor(name)
            except Exception as error:  # safetensors raises its own and plain ones
                raise FormatError(f"{self._files[name]}: {name[:80]!r}: {str(error)[:200]}") from error


def _open(path: Path) -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise UnsupportedError("Hugging Face folders need safetensors: pip install safetensors") from error
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise FormatError(f"{path} is no plain file")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise FormatError(f"{path} is damaged: a header of {length} bytes is not believed")
        return safetensors.safe_open(path, framework="pt")
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from error
    except FormatError:
        raise
    except BaseException as error:  # SafetensorError, and PanicException of a library in Rust
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise FormatError(f"{path} is damaged: {str(error)[:200]}; fetch it again") from error
