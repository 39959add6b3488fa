"""A compiled folder's manifest: what it holds, for which CPU, and whether it may be run. Needs no torch.

`edgeformer.json` names every other file with its size and SHA-256 (that finds damage, not malice). Native
code from a folder that others can write is refused unless the caller trusts it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ...compiler.errors import FormatError, TrustError, UnsupportedError

NAME = "edgeformer.json"
WEIGHTS = "weights.bin"
COMPILED, ONNX = "compiled", "onnx"  # kinds: native kernels; a graph for ONNX Runtime
SCHEMA = 1
MAX_MANIFEST = 64 << 20  # bytes
_PIECE = 4 << 20


@dataclass(frozen=True)
class KernelFile:
    """A kernel library that travels with a model, and the problem it was built for."""

    operator: str
    form: str
    spec: str
    configuration: str  # JSON
    file: str
    sizes: str = "[]"  # JSON: the buckets of run-time sizes that it serves, for problems with several


@dataclass
class CompiledFolder:
    """A compiled folder whose manifest has been read; `verify` tells whether the files are the manifest's."""

    path: Path
    data: dict[str, Any]
    kernels: tuple[KernelFile, ...]
    _found: dict[str, str] = field(default_factory=dict)
    _hashing: threading.Thread | None = None

    @property
    def kind(self) -> str:
        """COMPILED or ONNX."""
        return self.data["kind"]

    def file(self, name: str) -> Path:
        """Return the path of a file of the manifest; FormatError where the manifest has none."""
        if name not in self.data["files"]:
            raise FormatError(f"{self.path}: the manifest has no file {name!r}; compile the model again")
        return self.path / name

    def start_hashing(self) -> None:
        """Hash the weights in a thread (hashlib lets others run meanwhile); `verify` waits for it."""
        if self._hashing is None:
            self._hashing = threading.Thread(target=self._hash_weights, daemon=True)
            self._hashing.start()

    def verify(self) -> None:
        """Raise FormatError when the weights are not the ones of the manifest."""
        self.start_hashing()
        assert self._hashing is not None
        self._hashing.join()
        self._compare(WEIGHTS, self._found.get(WEIGHTS, ""))

    def _hash_weights(self) -> None:
        self._found[WEIGHTS] = _sha256(self.path / WEIGHTS)

    def _compare(self, name: str, digest: str) -> None:
        if digest != self.data["files"][name]["sha256"]:
            raise FormatError(
                f"{self.path}: {name} is damaged (its SHA-256 is another); compile the model again"
            )


def is_compiled(path: str | Path) -> bool:
    """Return whether `path` is a folder with a manifest."""
    return os.path.lexists(Path(path) / NAME)


def open_folder(path: str | Path, *, trust: bool = False) -> CompiledFolder:
    """Read and check a compiled folder's manifest and small files, and start to hash the weights.

    `trust` runs native code of a folder that belongs to, or can be written by, somebody else.

    Raises:
        FormatError: the manifest or a file is missing, damaged or of another size.
        TrustError: somebody else could have put the native code there.
        UnsupportedError: the folder was written for another version of EdgeFormer.
    """
    path = Path(path)
    data = read(path)
    folder = CompiledFolder(path, data, _kernels(path, data))
    _check_files(folder, trust)
    folder.start_hashing()
    for name in data["files"]:
        if name != WEIGHTS:
            folder._compare(name, _sha256(path / name))
    return folder


def read(path: Path) -> dict[str, Any]:
    """Return a folder's manifest, its fields checked but not the files. Raises FormatError."""
    manifest = path / NAME
    try:
        info = manifest.lstat()
        if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_MANIFEST:
            raise FormatError(f"{manifest} is no plain file of at most {MAX_MANIFEST} bytes")
        data = json.loads(manifest.read_bytes())
    except OSError as error:
        raise FormatError(f"cannot read {manifest}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{manifest} is damaged: {str(error)[:200]}") from error
    if not isinstance(data, dict) or data.get("kind") not in (COMPILED, ONNX):
        raise FormatError(f"{manifest} is not the manifest of a compiled folder")
    if data.get("schema") != SCHEMA:
        raise UnsupportedError(
            f"{manifest} has the schema {data.get('schema')!r}, not {SCHEMA}; compile the model again"
        )
    for name, kind in _FIELDS.items():
        if not isinstance(data.get(name), kind):
            raise FormatError(f"{manifest} is damaged: {name!r} is missing or no {kind.__name__}")
    for name, entry in data["files"].items():
        good = isinstance(entry, dict) and isinstance(entry.get("sha256"), str)
        if not good or not isinstance(entry.get("bytes"), int) or not _is_inside(name):
            raise FormatError(f"{manifest} is damaged: the entry of {name[:80]!r}")
    if WEIGHTS not in data["files"]:
        raise FormatError(f"{manifest} is damaged: it names no {WEIGHTS}")
    return data


_FIELDS = {
    "files": dict, "kernels": list, "target": dict, "config": dict, "options": dict, "weights": dict,
    "checkpoint": dict, "checked": dict, "versions": dict, "sources": str,
}  # fmt: skip


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return (
        bool(parts)
        and not name.startswith("/")
        and ".." not in parts
        and "\\" not in name
        and "\0" not in name
    )


def _kernels(path: Path, data: dict[str, Any]) -> tuple[KernelFile, ...]:
    try:
        found = tuple(KernelFile(**entry) for entry in data["kernels"])
    except TypeError as error:
        raise FormatError(f"{path / NAME} is damaged: its list of kernels") from error
    for kernel in found:
        if not all(isinstance(value, str) for value in vars(kernel).values()):
            raise FormatError(f"{path / NAME} is damaged: its list of kernels")
        if not _are_sizes(kernel.sizes):
            raise FormatError(f"{path / NAME} is damaged: the sizes of {kernel.operator[:40]!r}")
        if kernel.file not in data["files"]:
            raise FormatError(f"{path / NAME} is damaged: it names no file {kernel.file[:80]!r}")
    return found


def _are_sizes(text: str) -> bool:
    """Whether a text is a JSON list of objects of names and small whole numbers."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, list) and all(
        isinstance(at, dict) and all(type(size) is int and 0 <= size < 1 << 40 for size in at.values())
        for at in found
    )


def _check_files(folder: CompiledFolder, trust: bool) -> None:
    """Every file of the manifest is a plain file of its size, and only the user can have written it."""
    names = list(folder.data["files"])
    folders = {PurePosixPath(name).parent.as_posix() for name in names} | {"."}
    for name in (*sorted(folders), *names):
        path = folder.path / name
        try:
            info = path.stat() if name == "." else path.lstat()
        except (OSError, ValueError) as error:
            raise FormatError(f"{folder.path}: {name} is missing; compile the model again") from error
        wanted = stat.S_ISDIR if name in folders else stat.S_ISREG
        if not wanted(info.st_mode):
            raise FormatError(f"{folder.path}: {name} is no plain {'folder' if name in folders else 'file'}")
        if name not in folders and info.st_size != folder.data["files"][name]["bytes"]:
            raise FormatError(
                f"{folder.path}: {name} has {info.st_size} bytes, not {folder.data['files'][name]['bytes']}; "
                "the copy is not complete"
            )
        if folder.kind == COMPILED and not trust and (problem := _foreign(info)):
            raise TrustError(
                f"{folder.path} holds native code, and {name} {problem}. Where you trust whoever can write "
                "there, run it with --trust; else compile the model yourself"
            )


def _foreign(info: os.stat_result) -> str:
    if not hasattr(os, "getuid"):
        return ""
    if info.st_uid != os.getuid():
        return "belongs to somebody else"
    return "can be written by others" if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else ""


def save(folder: Path, data: dict[str, Any]) -> None:
    """Write the manifest of a folder whose other files are all there; `data` lacks only their table."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for path in files:
        os.chmod(path, 0o700 if path.suffix == ".so" else 0o600)
    table = {p.relative_to(folder).as_posix(): file_entry(p) for p in files}
    with open(folder / NAME, "w") as file:
        json.dump({**data, "schema": SCHEMA, "files": table}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(folder / NAME, 0o600)


def _sha256(path: Path) -> str:
    """Return a file's SHA-256 in hex, or "" where it cannot be read."""
    digest, buffer = hashlib.sha256(), bytearray(_PIECE)
    view = memoryview(buffer)
    try:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(view[:count])
    except OSError:
        return ""
    return digest.hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """Return what the manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}
