"""Files of rows, as `-o json` and `-o jsonl` write them: read, checked, and told apart by schema version."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..compiler.errors import FormatError
from .provenance import SCHEMA_VERSION

NEEDED = ("engine", "test", "tokens_per_second", "spread", "limit_fraction", "schema_version")
LARGEST = 64 << 20  # bytes: far above any real file of rows


@dataclass(frozen=True)
class Results:
    """One file's rows; `label` names it in tables and plots."""

    path: Path
    label: str
    rows: list[dict[str, Any]]

    @property
    def device(self) -> str:
        """The CPU's name."""
        return str(self.rows[0].get("device", {}).get("cpu", "unknown device"))

    @property
    def fingerprint(self) -> str:
        """The device's fingerprint, "" where the rows have none (schema 1)."""
        return str(self.rows[0].get("fingerprint", ""))


def read_results(path: Path) -> Results:
    """Read a JSON list or JSON lines of rows. Raises FormatError where the file is missing or damaged."""
    try:
        if path.stat().st_size > LARGEST:
            raise FormatError(f"{path} is larger than {LARGEST >> 20} MB: not a file of rows")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not text: {error.reason} at byte {error.start}") from error
    rows = _parse(path, text)
    for number, row in enumerate(rows, 1):
        _check(path, number, row)
    if not rows:
        raise FormatError(f"{path} has no rows")
    return Results(path, path.stem, rows)


def read_all(paths: Sequence[Path]) -> list[Results]:
    """Read files of one schema version. Raises FormatError where they are of several, or hold no file."""
    found = [read_results(path) for path in paths]
    versions = {row["schema_version"] for result in found for row in result.rows}
    if len(versions) > 1:
        named = "; ".join(
            f"{r.path}: {', '.join(map(str, sorted({row['schema_version'] for row in r.rows})))}"
            for r in found
        )
        raise FormatError(f"the files have rows of different schema versions ({named}); measure again")
    return found


def _parse(path: Path, text: str) -> list[Any]:
    stripped = text.lstrip()
    try:
        if stripped.startswith("["):
            return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is damaged: {error}") from error
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise FormatError(f"{path} is damaged in line {number}: {error}") from error
    return rows


def _check(path: Path, number: int, row: Any) -> None:
    if not isinstance(row, dict):
        raise FormatError(f"row {number} of {path} is a {type(row).__name__}, not a row of a measurement")
    if missing := [name for name in NEEDED if name not in row]:
        raise FormatError(f"row {number} of {path} lacks {', '.join(missing)}")
    version, speed = row["schema_version"], row["tokens_per_second"]
    if not isinstance(version, int) or isinstance(version, bool) or version > SCHEMA_VERSION or version < 1:
        raise FormatError(
            f"row {number} of {path} has schema version {version!r}; "
            f"this EdgeFormer reads 1 to {SCHEMA_VERSION}"
        )
    if speed is not None and (isinstance(speed, bool) or not isinstance(speed, int | float) or not speed > 0):
        raise FormatError(f"row {number} of {path} has a speed of {speed!r}")
    samples = row.get("samples", [])
    if not isinstance(samples, list) or not all(isinstance(s, int | float) and s > 0 for s in samples):
        raise FormatError(f"row {number} of {path} has samples that are no speeds")
    ratios = row.get("ratios", {})
    if not isinstance(ratios, dict) or not all(map(_is_ratio, ratios.values())):
        raise FormatError(f"row {number} of {path} has ratios that are none")


def _is_ratio(found: Any) -> bool:
    """Return whether this is a ratio with its bounds and its pairs, all of them positive."""
    if not isinstance(found, dict) or not isinstance(found.get("pairs"), list) or not found["pairs"]:
        return False
    numbers = [found.get("ratio"), found.get("low"), found.get("high"), *found["pairs"]]
    return all(isinstance(n, int | float) and not isinstance(n, bool) and n > 0 for n in numbers)


def engines(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Return the engines of rows, EdgeFormer first."""
    names = dict.fromkeys(row["engine"] for row in rows)
    return sorted(names, key=lambda name: name != "edgeformer")
