"""Tuned results: what configuration won for a problem on a device. Data only, checked wherever it is from."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .artifacts import cache_root
from .errors import FormatError, UnsupportedError

SCHEMA = 1
SOURCES = ("measured", "static")
POLICIES = ("off", "cached", "on")
MOST_BYTES = 64 << 10  # of one record's file
_MOST_TEXT, _MOST_ITEMS, _MOST_NUMBER = 600, 32, 1 << 40
_NAME = re.compile(r"[A-Za-z0-9_.+-]{1,64}")
_TEXT = re.compile(r"[ -~]*")


@dataclass(frozen=True)
class Record:
    """A configuration that won, for one problem, phase, number of threads and device.

    `family` and `sizes` name the problem (see operator.Tuning; `sizes` with the run-time sizes), `space` the
    tuning space's signature. `seconds` and `spread` are of one call, `default_seconds` of the default
    configuration in the same run; 0 where nothing was measured (`source` "static": ranked by its code).
    `versions` are the tools' when it was made: provenance, no key.
    """

    operator: str
    form: str
    space: str
    family: str
    phase: str
    sizes: dict[str, int]
    threads: int
    device: str
    mcpu: str
    isa: str
    arch: str
    configuration: dict[str, Any]
    seconds: float = 0.0
    spread: float = 0.0
    default_seconds: float = 0.0
    trials: int = 0
    source: str = "measured"
    versions: dict[str, str] | None = None

    @property
    def key(self) -> str:
        """The digest of what the record is about: of two with one key, the newer one counts."""
        about = [self.operator, self.form, self.space, self.family, self.phase, sorted(self.sizes.items())]
        text = json.dumps([*about, self.threads, self.device, self.mcpu, self.isa, self.arch])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def digest(self) -> str:
        """The digest of the whole record."""
        return hashlib.sha256(self.text().encode()).hexdigest()[:32]

    def text(self) -> str:
        """The record as JSON."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, sort_keys=True)


def parse(data: Any) -> Record:
    """Return the record that decoded JSON describes. Raises FormatError for whatever is not one."""
    if not isinstance(data, dict):
        raise FormatError("a record is a JSON object")
    known = {field.name for field in fields(Record)}
    if data.get("schema") != SCHEMA or isinstance(data.get("schema"), bool):
        raise FormatError(f"a record of schema {str(data.get('schema'))[:20]!r}; this version reads {SCHEMA}")
    if data.keys() != known | {"schema"}:
        odd = sorted(str(name)[:40] for name in data.keys() ^ (known | {"schema"}))
        raise FormatError(f"a record with missing or unknown fields: {', '.join(odd[:5])}")
    for name in ("operator", "form", "phase", "mcpu", "isa", "arch"):
        _require(isinstance(data[name], str) and _NAME.fullmatch(data[name]), name)
    for name in ("space", "family", "device"):
        text = data[name]
        _require(isinstance(text, str) and len(text) <= _MOST_TEXT and _TEXT.fullmatch(text), name)
    for name in ("threads", "trials"):
        _require(_whole(data[name]) and 0 <= data[name] <= 1 << 20, name)
    for name in ("seconds", "spread", "default_seconds"):
        value = data[name]
        good = isinstance(value, int | float) and not isinstance(value, bool)
        _require(good and abs(value) <= 1e6 and math.isfinite(value) and value >= 0, name)
    _require(data["source"] in SOURCES, "source")
    sizes, configuration, versions = data["sizes"], data["configuration"], data["versions"]
    _require(_mapping(sizes) and all(_whole(v) and 0 <= v <= _MOST_NUMBER for v in sizes.values()), "sizes")
    _require(_mapping(configuration) and all(map(_plain, configuration.values())), "configuration")
    good = versions is None or (_mapping(versions) and all(isinstance(v, str) for v in versions.values()))
    _require(good and all(_TEXT.fullmatch(v) and len(v) <= 64 for v in (versions or {}).values()), "versions")
    return Record(**{name: data[name] for name in known})


def _require(good: Any, name: str) -> None:
    if not good:
        raise FormatError(f"a record's {name} is not what it may be")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _mapping(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= _MOST_ITEMS
        and all(isinstance(key, str) and _NAME.fullmatch(key) for key in value)
    )


def _plain(value: Any) -> bool:
    if isinstance(value, str):
        return _NAME.fullmatch(value) is not None
    return isinstance(value, bool) or (_whole(value) and abs(value) <= _MOST_NUMBER)


def decode(text: bytes) -> Any:
    """Return JSON of bounded size. Raises FormatError."""
    if len(text) > MOST_BYTES * 1024:
        raise FormatError(f"{len(text)} bytes are no tuning records")
    try:
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise FormatError(f"no JSON: {str(error)[:100]}") from None


class RecordStore:
    """The user's records, one file each, and those that ship with the package, one file an operator.

    A file that is damaged is left out with one warning.
    """

    def __init__(self, root: Path | None = None, shipped: Path | None = None) -> None:
        self.root = (root or cache_root()) / "records"
        self.shipped = shipped or _shipped()
        self._warned = False

    def all(self) -> list[tuple[Record, str]]:
        """Return (record, "yours", "imported" or "shipped"), the user's first."""
        found = []
        for kind in ("yours", "imported"):
            found += [(record, kind) for _, record in self.files(kind)]
        return found + [(record, "shipped") for record in self._shipped_records()]

    def files(self, kind: str = "yours") -> list[tuple[Path, Record]]:
        """Return (file, record) of the records of one kind that can be read."""
        found = []
        for path in _json_files(self.root / kind):
            try:
                record = parse(decode(read_plain(path, MOST_BYTES)))
                if path.stem != record.key:
                    raise FormatError("it is about another problem than its name says")
                found.append((path, record))
            except (FormatError, OSError) as error:
                self._warn(f"ignoring the tuning record {path}: {error}")
        return found

    def problems(self) -> list[tuple[Path, str]]:
        """Return (file, what is wrong) of every file of the user's records."""
        found = []
        for kind in ("yours", "imported"):
            for path in _json_files(self.root / kind):
                try:
                    if parse(decode(read_plain(path, MOST_BYTES))).key != path.stem:
                        found.append((path, "it is about another problem than its name says"))
                except (FormatError, OSError) as error:
                    found.append((path, str(error)))
        return found

    def put(self, record: Record, kind: str = "yours") -> bool:
        """Store a record, in place of an older one about the same; False, and a warning, where it fails."""
        folder = self.root / kind
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_text(folder / f"{record.key}.json", record.text())
        except OSError as error:
            self._warn(f"tuning records are not kept: {folder} cannot be written ({error})")
            return False
        return True

    def prune(self) -> int:
        """Delete the user's and the imported records; return how many."""
        count = 0
        for kind in ("yours", "imported", "verified"):
            for path in _files(self.root / kind):
                path.unlink(missing_ok=True)
                count += kind != "verified"
        return count

    def is_verified(self, record: Record, versions: str) -> bool | None:
        """Whether this device found a record's configuration right (True), wrong (False), or did not look."""
        try:
            return {"right": True, "wrong": False}.get(self._mark(record, versions).read_text()[:8])
        except (OSError, UnicodeDecodeError):
            return None

    def mark(self, record: Record, versions: str, right: bool) -> None:
        """Remember what the check of a record found, for these tool versions."""
        path = self._mark(record, versions)
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_text(path, "right" if right else "wrong")
        except OSError as error:
            self._warn(f"checks of records are not remembered: {path.parent} cannot be written ({error})")

    def _mark(self, record: Record, versions: str) -> Path:
        digest = hashlib.sha256(f"{record.digest} {versions}".encode()).hexdigest()[:32]
        return self.root / "verified" / digest

    def _shipped_records(self) -> Iterable[Record]:
        if self.shipped is None:
            return
        for path in sorted(self.shipped.glob("*/*.json")):
            try:
                yield from parse_many(decode(path.read_bytes()))
            except (FormatError, OSError) as error:
                self._warn(f"ignoring the shipped records {path}: {error}")

    def _warn(self, text: str) -> None:
        if not self._warned:
            warnings.warn(text, RuntimeWarning, stacklevel=3)
            self._warned = True


def parse_many(data: Any) -> list[Record]:
    """Return the records of an exported file: {"schema", "records": [...]}. Raises FormatError."""
    if not isinstance(data, dict) or data.keys() != {"schema", "records"} or data["schema"] != SCHEMA:
        raise FormatError(f"not a file of tuning records of schema {SCHEMA}")
    if not isinstance(data["records"], list) or len(data["records"]) > 100_000:
        raise FormatError("its records are no list")
    return [parse(entry) for entry in data["records"]]


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all, and on the disk."""
    descriptor, aside = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def _shipped() -> Path | None:
    path = Path(__file__).resolve().parent.parent / "autotune_cache"
    return path if path.is_dir() else None


def _json_files(folder: Path) -> list[Path]:
    return [path for path in _files(folder) if path.suffix == ".json" and not path.name.startswith(".")]


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def read_plain(path: Path, most: int) -> bytes:
    """Return a plain file's bytes. Raises FormatError for a link, a pipe, or one that is too large."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise FormatError(f"it cannot be opened as a plain file ({error.strerror})") from None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FormatError("it is not a plain file")
        data = file.read(most + 1)
    if len(data) > most:
        raise FormatError(f"it is larger than {most} bytes")
    return data


def policy() -> str:
    """Return EDGEFORMER_TUNE: "off" (defaults), "cached" (records; the default) or "on".

    With "on", what has no record is tuned when a model is loaded, compiled or optimized, never in a call.
    """
    value = os.environ.get("EDGEFORMER_TUNE", "cached") or "cached"
    if value not in POLICIES:
        raise UnsupportedError(f"EDGEFORMER_TUNE={value!r} is unknown; use {', '.join(POLICIES)}")
    return value
