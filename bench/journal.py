"""What a run has measured so far, on disk at once, so that a killed run goes on with --resume."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def run_folder() -> Path:
    """Return where unfinished runs are kept: in the cache folder, never in the package."""
    from ..compiler.artifacts import cache_root

    return cache_root() / "bench"


class Journal:
    """One JSON line a finished unit of work. A torn last line is what a kill leaves: it is dropped.

    `identity` is everything that must be the same for old measurements to count: the model's file, options,
    device, commit and versions. Without `resume` the journal starts empty.
    """

    def __init__(self, identity: dict[str, Any], resume: bool, folder: Path | None = None) -> None:
        text = json.dumps(identity, sort_keys=True, default=str)
        folder = folder or run_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.jsonl"
        self.units: dict[str, Any] = {}
        if resume:
            self.units = _read(self.path)
            _rewrite(self.path, self.units)
        else:
            self.path.unlink(missing_ok=True)

    def __contains__(self, unit: str) -> bool:
        return unit in self.units

    def __getitem__(self, unit: str) -> Any:
        return self.units[unit]

    def get(self, unit: str) -> Any:
        """Return what was kept of a unit, None where it is not finished."""
        return self.units.get(unit)

    def keep(self, unit: str, data: Any) -> Any:
        """Store a finished unit durably; return its data as it will be read again."""
        line = json.dumps({"unit": unit, "data": data})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.units[unit] = json.loads(line)["data"]
        return self.units[unit]

    def done(self) -> None:
        """Forget the run: its rows have been given out."""
        self.path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if not path.exists():
        return found
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            found[entry["unit"]] = entry["data"]
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _rewrite(path: Path, units: dict[str, Any]) -> None:
    """Leave out torn lines, so that the next one starts on its own."""
    if units or path.exists():
        text = "".join(json.dumps({"unit": u, "data": d}) + "\n" for u, d in units.items())
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
