"""Small JSON and text files of a model folder, read with a limit and typed errors."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from ...compiler.errors import FormatError

MAX_JSON = 64 << 20  # bytes


def read_text(path: Path, limit: int = MAX_JSON) -> str:
    """Return a file's UTF-8 text. Raises FormatError."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode) or info.st_size > limit:
            raise FormatError(f"{path} is no plain file of at most {limit} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a name with a zero byte
        raise FormatError(f"cannot read {path}: {str(error)[:200]}") from error


def read_object(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """Return a file's JSON object. Raises FormatError."""
    try:
        data = json.loads(read_text(path, limit))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is damaged: {str(error)[:200]}") from error
    if not isinstance(data, dict):
        raise FormatError(f"{path} holds no JSON object")
    return data


def read_optional(path: Path) -> dict[str, Any]:
    """Return a file's JSON object, {} where there is no such file. Raises FormatError."""
    return read_object(path) if path.exists() else {}
