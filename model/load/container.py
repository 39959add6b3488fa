"""The GGUF container, read strictly: every count, length and offset is checked before it is used.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...compiler.errors import FormatError, UnsupportedError

MAGIC = b"GGUF"
MAX_DIMS = 4
MAX_ENTRIES = 65535  # tensors, or keys; the largest models have some thousands
MAX_NAME = 65535  # bytes of a key or of a tensor's name

SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
STRING, ARRAY = 8, 9

TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K",
    11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
# elements and bytes of a block, for the types that this project reads
BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22),
    "Q5_1": (32, 24), "Q8_0": (32, 34), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144),
    "Q5_K": (256, 176), "Q6_K": (256, 210), "IQ4_NL": (32, 18),
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: rows first, so a linear weight is (N, K)."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    nbytes: int

    def part(self, start: int, stop: int) -> TensorInfo:
        """Return rows [start, stop), which lie one after the other."""
        row = self.nbytes // self.shape[0]
        shape = (stop - start, *self.shape[1:])
        return TensorInfo(self.name, self.type, shape, self.offset + start * row, (stop - start) * row)


class _Cursor:
    """A position in the header; running past the end is a FormatError, never a struct or index error."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def damaged(self, what: str) -> FormatError:
        return FormatError(f"{self.path}: {what} (at byte {self.at}); the file is damaged, fetch it again")

    def take(self, count: int, what: str) -> bytes:
        if count > len(self.data) - self.at:
            raise self.damaged(f"{what} of {count} bytes runs past the end of the file")
        self.at += count
        return self.data[self.at - count : self.at]

    def scalar(self, layout: str, what: str):
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]

    def text(self, what: str, limit: int | None = None) -> str:
        length = self.scalar("<Q", what)
        if limit is not None and length > limit:
            raise self.damaged(f"{what} is {length} bytes long")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is not UTF-8") from None

    def value(self, kind: int, key: str):
        what = f"the value of {key!r}"
        if kind in SCALARS:
            return self.scalar(SCALARS[kind], what)
        if kind == STRING:
            return self.text(what)
        if kind != ARRAY:
            raise self.damaged(f"{what} has the unknown type {kind}")
        item, length = self.scalar("<I", what), self.scalar("<Q", what)
        if item == STRING:
            if length * 8 > len(self.data) - self.at:
                raise self.damaged(f"{what} has {length} strings, more than the file holds")
            return [self.text(what) for _ in range(length)]
        if item not in SCALARS:
            raise self.damaged(f"{what} is an array of the unsupported type {item}")
        raw = self.take(length * struct.calcsize(SCALARS[item]), what)
        return np.frombuffer(raw, dtype=np.dtype(SCALARS[item])).tolist()


class Container:
    """The metadata and the tensor table of one GGUF file; tensor bytes are read on demand, not mapped.

    Reading by copy keeps the file's pages out of the process: while a model loads, only the packed
    weights and the one tensor at hand are in memory.

    Raises:
        FormatError: there is no such file, it is not GGUF, or it is damaged or truncated.
        UnsupportedError: a version, byte order or tensor type that is not read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                if file.read(4) != MAGIC:
                    raise FormatError(f"{self.path} is not a GGUF file: it does not start with {MAGIC!r}")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    self._parse(_Cursor(data, self.path))
        except OSError as error:
            raise FormatError(f"cannot read {self.path}: {error.strerror or error}") from error

    def _parse(self, cursor: _Cursor) -> None:
        cursor.take(4, "the magic")
        version = cursor.scalar("<I", "the version")
        if version & 0xFFFF == 0:
            raise UnsupportedError(f"{self.path}: big-endian GGUF is not supported; convert it first")
        if version not in (2, 3):
            raise UnsupportedError(f"{self.path}: GGUF version {version} is not supported (2 and 3 are)")
        num_tensors = cursor.scalar("<Q", "the number of tensors")
        num_keys = cursor.scalar("<Q", "the number of keys")
        if max(num_tensors, num_keys) > MAX_ENTRIES:
            raise cursor.damaged(f"{num_tensors} tensors and {num_keys} keys are not believed")
        self.metadata = {}
        for _ in range(num_keys):
            key = cursor.text("a key", MAX_NAME)
            if key in self.metadata:
                raise cursor.damaged(f"the key {key!r} appears twice")
            self.metadata[key] = cursor.value(cursor.scalar("<I", f"the type of {key!r}"), key)
        rows = {}
        for _ in range(num_tensors):
            name = cursor.text("a tensor's name", MAX_NAME)
            if name in rows:
                raise cursor.damaged(f"the tensor {name!r} appears twice")
            rows[name] = self._row(cursor, name)
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise cursor.damaged(f"general.alignment is {alignment!r}, not a power of two")
        self.size = len(cursor.data)
        start = -(-cursor.at // alignment) * alignment
        self.tensors = {name: self._place(name, row, start, alignment) for name, row in rows.items()}

    @staticmethod
    def _row(cursor: _Cursor, name: str) -> tuple[tuple[int, ...], int, int]:
        num_dims = cursor.scalar("<I", f"the rank of {name!r}")
        if not 1 <= num_dims <= MAX_DIMS:
            raise cursor.damaged(f"the tensor {name!r} has {num_dims} dimensions")
        dims = tuple(cursor.scalar("<Q", f"the shape of {name!r}") for _ in range(num_dims))
        if 0 in dims:
            raise cursor.damaged(f"the tensor {name!r} has the shape {dims}")
        return (
            dims[::-1],
            cursor.scalar("<I", f"the type of {name!r}"),
            cursor.scalar("<Q", f"the offset of {name!r}"),
        )

    def _place(
        self, name: str, row: tuple[tuple[int, ...], int, int], start: int, alignment: int
    ) -> TensorInfo:
        shape, kind, offset = row
        type_name = TYPE_NAMES.get(kind)
        if type_name is None:
            raise FormatError(f"{self.path}: the tensor {name!r} has the unknown type number {kind}")
        if type_name not in BLOCKS:
            return TensorInfo(name, type_name, shape, start + offset, 0)
        elements, size = BLOCKS[type_name]
        if shape[-1] % elements:
            raise FormatError(
                f"{self.path}: rows of {name!r} have {shape[-1]} elements, no multiple of {elements}"
            )
        nbytes = math.prod(shape) // elements * size
        if offset % alignment or start + offset + nbytes > self.size:
            raise FormatError(
                f"{self.path}: the tensor {name!r} ({nbytes} bytes at {start + offset}) lies outside of the "
                f"file ({self.size} bytes) or off its alignment; the file is damaged, fetch it again"
            )
        return TensorInfo(name, type_name, shape, start + offset, nbytes)

    def info(self, name: str) -> TensorInfo:
        """The table row of a tensor; FormatError if the file has none, UnsupportedError for its type."""
        if name not in self.tensors:
            raise FormatError(f"{self.path}: the tensor {name!r} is missing")
        info = self.tensors[name]
        if info.type not in BLOCKS:
            raise UnsupportedError(
                f"{self.path}: the tensor {name!r} has the type {info.type}; supported: {', '.join(BLOCKS)}"
            )
        return info

    def read(self, name: str) -> np.ndarray:
        """The bytes of a tensor (uint8, one dimension, writable)."""
        return self.read_info(self.info(name))

    def read_info(self, info: TensorInfo) -> np.ndarray:
        """The bytes of a tensor, or of the rows that ``info.part`` gives."""
        name = info.name
        try:
            data = np.fromfile(self.path, dtype=np.uint8, count=info.nbytes, offset=info.offset)
        except OSError as error:
            raise FormatError(f"cannot read {self.path}: {error.strerror or error}") from error
        if data.nbytes != info.nbytes:
            raise FormatError(
                f"{self.path}: the tensor {name!r} ended early; did the file change while open?"
            )
        return data
