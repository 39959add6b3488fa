"""Folders that are written aside and renamed: an unfinished one never looks complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...compiler.errors import CapacityError, FormatError


@contextmanager
def new_folder(output: Path, is_own: Callable[[Path], bool]) -> Iterator[Path]:
    """Give a temporary folder beside `output`, and rename it to `output` when the block ends well.

    A folder of the same kind (`is_own`) or an empty one is replaced. Raises FormatError where `output` is
    something else, CapacityError where the disk is full or cannot be written.
    """
    require_replaceable(output, is_own)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise CapacityError(f"cannot write beside {output}: {error.strerror or error}") from error
    try:
        yield aside
        _replace(aside, output)
    except OSError as error:
        raise CapacityError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def require_replaceable(output: Path, is_own: Callable[[Path], bool]) -> None:
    """Raise FormatError where `output` holds something that must not be lost."""
    if os.path.lexists(output) and not is_own(output):
        empty = output.is_dir() and not any(output.iterdir())
        if not empty:
            raise FormatError(f"{output} exists and was not written by this command; name another folder")


def _replace(aside: Path, output: Path) -> None:
    """Rename the finished folder into place; the old one goes only then."""
    old = None
    if os.path.lexists(output):
        old = output.with_name(f".{output.name}-old-{os.getpid()}")
        os.rename(output, old)
    try:
        os.rename(aside, output)
    except OSError:
        if old is not None:
            os.rename(old, output)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
