"""Records from and for other people: exported for review, imported as data that is checked before use."""

from __future__ import annotations

import json
import os
import stat
from collections import defaultdict
from pathlib import Path

from .errors import CapacityError, FormatError
from .records import SCHEMA, Record, RecordStore, decode, parse_many, read_plain, write_text

MOST_FILE_BYTES = 16 << 20
_MOST_FILES, _MOST_RECORDS = 1000, 20_000


def export(
    folder: Path, operator: str = "", store: RecordStore | None = None, *, better: bool = False
) -> tuple[int, int]:
    """Write the user's records to `folder`/<mcpu>/<operator>.json; return (records, files).

    With `better` only those that beat the default by more than their spread, and their neighbours of the same
    family and phase, where the default stands and the nearest record should say so: what is worth shipping.

    Raises CapacityError where the folder cannot be written.
    """
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    own = [record for record, origin in (store or RecordStore()).all() if origin == "yours"]
    winners = {_neighbours(record) for record in own if is_better(record)}
    for record in own:
        if operator in ("", record.operator) and (not better or _neighbours(record) in winners):
            groups[record.mcpu, record.operator].append(record)
    for (mcpu, name), records in groups.items():
        records.sort(key=lambda record: (record.family, record.phase, sorted(record.sizes.items())))
        entries = [json.loads(record.text()) for record in records]
        text = json.dumps({"schema": SCHEMA, "records": entries}, indent=1, sort_keys=True) + "\n"
        try:
            (folder / mcpu).mkdir(parents=True, exist_ok=True)
            write_text(folder / mcpu / f"{name}.json", text)
        except OSError as error:
            raise CapacityError(f"{folder} cannot be written: {error}") from error
    return sum(map(len, groups.values())), len(groups)


def _neighbours(record: Record) -> tuple[str, ...]:
    """Return what records that serve each other's sizes have in common."""
    r = record
    return r.operator, r.form, r.space, r.family, r.phase, r.device, r.mcpu, r.isa, r.arch


def is_better(record: Record) -> bool:
    """Whether a record's configuration was faster than the default by more than its spread."""
    return record.source == "measured" and 0 < record.seconds < record.default_seconds - record.spread


def load_records(source: Path, store: RecordStore | None = None) -> int:
    """Import the records of a file, or of the .json files of a folder, all or none; return how many.

    Nothing in them is executed or names a file. Raises FormatError for links, pipes, files that are too
    large, and whatever is no record; CapacityError where the cache cannot be written.
    """
    records: list[Record] = []
    for path in _files(source):
        try:
            records += parse_many(decode(read_plain(path, MOST_FILE_BYTES)))
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from None
        if len(records) > _MOST_RECORDS:
            raise FormatError(f"{source} holds more than {_MOST_RECORDS} records")
    if not records:
        raise FormatError(f"{source} holds no records")
    store = store or RecordStore()
    for record in records:
        if not store.put(record, "imported"):
            raise CapacityError(f"{store.root} cannot be written; free some disk space")
    return len(records)


def _files(source: Path) -> list[Path]:
    try:
        mode = source.lstat().st_mode
    except OSError as error:
        raise FormatError(f"{source} cannot be read: {error.strerror}") from None
    if stat.S_ISLNK(mode):
        raise FormatError(f"{source} is a link; give the file itself")
    if not stat.S_ISDIR(mode):
        return [source]
    found: list[Path] = []
    for folder, folders, names in os.walk(source, followlinks=False):
        if any((Path(folder) / name).is_symlink() for name in folders):
            raise FormatError(f"{folder} holds a link to a folder")
        found += [Path(folder) / name for name in sorted(names) if name.endswith(".json")]
        if len(found) > _MOST_FILES:
            raise FormatError(f"{source} holds more than {_MOST_FILES} files")
    return sorted(found)
