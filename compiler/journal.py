"""Every trial, durable when it ends (SQLite); several tuners share one folder, each problem has one tuner."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .artifacts import cache_root

GOOD, NOISY = "good", "noisy"  # right and timed; right, but the machine's speed moved each time it was timed
_MOST_STARTS = 2  # a configuration that was under way in so many tuners that died is taken to kill them
_BUSY_SECONDS = 60
_TABLES = (
    "CREATE TABLE IF NOT EXISTS problems (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE,"
    " title TEXT NOT NULL, done INTEGER NOT NULL DEFAULT 0)",
    "CREATE TABLE IF NOT EXISTS trials (problem INTEGER NOT NULL REFERENCES problems(id),"
    " configuration TEXT NOT NULL, status TEXT NOT NULL, ratio REAL, seconds REAL, spread REAL,"
    " note TEXT NOT NULL DEFAULT '', starts INTEGER NOT NULL DEFAULT 1,"
    " PRIMARY KEY (problem, configuration))",
)


@dataclass(frozen=True)
class Trial:
    """What came of a configuration.

    `status` is "good", "noisy", "wrong", "build", "crash", "hang", "memory", "pruned" or "error"; `ratio` is
    its time over the default's, both measured in turn; `seconds` and `spread` are of one call.
    """

    configuration: dict[str, Any]
    status: str
    ratio: float | None = None
    seconds: float | None = None
    spread: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Progress:
    """A problem in the journal: its title, trials so far, the best ratio, and whether it is finished."""

    key: str
    title: str
    trials: int
    best: float | None
    done: bool


class Journal:
    """The trials under `root`/tuning; where that cannot be written, in memory, with a warning."""

    def __init__(self, root: Path | None = None) -> None:
        self.folder = (root or cache_root()) / "tuning"
        self.durable = True
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._open_file()
        except (OSError, sqlite3.Error) as error:
            self._volatile(error)

    def _open(self, path: str) -> None:
        self._database = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
        # A rollback journal works on every file system; FULL: a trial that ended is on the disk.
        self._database.execute("PRAGMA synchronous=FULL")
        self._transact(lambda database: [database.execute(text) for text in _TABLES])

    def _open_file(self) -> None:
        """Open the database; one that is damaged is put aside, and said so."""
        path = self.folder / "journal.sqlite3"
        with locked(self.folder / "open.lock"):
            try:
                self._open(str(path))
                (state,) = self._database.execute("PRAGMA quick_check(1)").fetchone()
                if state != "ok":
                    raise sqlite3.DatabaseError(state)
            except sqlite3.OperationalError:  # busy, full, read-only: not damage
                raise
            except sqlite3.DatabaseError as error:
                self._database.close()
                aside = path.with_name(f"journal.damaged-{time.time_ns()}")
                os.rename(path, aside)
                warnings.warn(
                    f"the tuning journal is damaged ({error}); it is now {aside}, and trials start anew",
                    RuntimeWarning,
                    stacklevel=4,
                )
                self._open(str(path))

    def _volatile(self, error: Exception) -> None:
        warnings.warn(
            f"trials are not kept: {self.folder} cannot be used ({error})", RuntimeWarning, stacklevel=4
        )
        self.durable = False
        self._open(":memory:")

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Hold the problem `key` for this process; False where another tuner has it.

        The system gives a claim back when its process ends, however it ends.
        """
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        with locked(self.folder / "claims" / f"{name}.lock", wait=False) as got:
            yield got

    def trials(self, key: str) -> list[Trial]:
        """Return the trials of a problem that ended, oldest first."""
        rows = self._database.execute(
            "SELECT configuration, status, ratio, seconds, spread, note FROM trials JOIN problems"
            " ON problems.id = trials.problem WHERE key = ? AND status != 'running' ORDER BY trials.rowid",
            (key,),
        )
        return [Trial(json.loads(c), *rest) for c, *rest in rows]

    def start(self, key: str, title: str, configuration: Mapping[str, Any]) -> bool:
        """Note that a trial begins; False when it must not: it ended before, or killed its tuners."""
        text = _canonical(configuration)

        def write(database: sqlite3.Connection) -> bool:
            database.execute("INSERT OR IGNORE INTO problems (key, title) VALUES (?, ?)", (key, title))
            (problem,) = database.execute("SELECT id FROM problems WHERE key = ?", (key,)).fetchone()
            where = (problem, text)
            row = database.execute(
                "SELECT status, starts FROM trials WHERE problem = ? AND configuration = ?", where
            ).fetchone()
            if row is None:
                database.execute(
                    "INSERT INTO trials (problem, configuration, status) VALUES (?, ?, 'running')", where
                )
                return True
            if row[0] != "running":
                return False
            again = row[1] < _MOST_STARTS
            status, note = ("running", "") if again else ("crash", "the tuner died during this trial, twice")
            database.execute(
                "UPDATE trials SET starts = starts + 1, status = ?, note = ?"
                " WHERE problem = ? AND configuration = ?",
                (status, note, *where),
            )
            return again

        return self._write(write)

    def finish(self, key: str, trial: Trial) -> None:
        """Store what came of a trial; it is durable when this returns."""
        values = (trial.status, trial.ratio, trial.seconds, trial.spread, trial.note[:500])
        self._write(
            lambda database: database.execute(
                "UPDATE trials SET status = ?, ratio = ?, seconds = ?, spread = ?, note = ?"
                " WHERE problem = (SELECT id FROM problems WHERE key = ?) AND configuration = ?",
                (*values, key, _canonical(trial.configuration)),
            )
        )

    def abandon(self, key: str, configuration: Mapping[str, Any]) -> None:
        """Note that a trial that began was called off, by no fault of its configuration."""
        self._write(
            lambda database: database.execute(
                "DELETE FROM trials WHERE status = 'running' AND configuration = ?"
                " AND problem = (SELECT id FROM problems WHERE key = ?)",
                (_canonical(configuration), key),
            )
        )

    def settle(self, key: str, done: bool = True) -> None:
        """Note that a problem is finished, or to be taken up again."""
        self._write(
            lambda database: database.execute("UPDATE problems SET done = ? WHERE key = ?", (int(done), key))
        )

    def forget(self) -> None:
        """Delete every problem and trial."""
        self._write(lambda database: database.execute("DELETE FROM trials"))
        self._write(lambda database: database.execute("DELETE FROM problems"))

    def progress(self) -> list[Progress]:
        """Return every problem: trials that ended, best ratio so far, finished or not."""
        rows = self._database.execute(
            "SELECT key, title, COUNT(trials.configuration), MIN(CASE status WHEN 'good' THEN ratio END),"
            " done"
            " FROM problems LEFT JOIN trials ON problem = id AND status != 'running' GROUP BY id ORDER BY id"
        )
        return [Progress(key, title, count, best, bool(done)) for key, title, count, best, done in rows]

    def is_done(self, key: str) -> bool:
        """Whether a problem is finished."""
        row = self._database.execute("SELECT done FROM problems WHERE key = ?", (key,)).fetchone()
        return bool(row and row[0])

    def _write(self, write: Callable[[sqlite3.Connection], Any]) -> Any:
        """Run one transaction; when the disk is full or read-only, what is known goes on in memory."""
        try:
            return self._transact(write)
        except sqlite3.Error as error:
            if not self.durable:
                raise
            old = self._database
            self._volatile(error)
            with contextlib.suppress(sqlite3.Error):
                old.backup(self._database)
            with contextlib.suppress(sqlite3.Error):
                old.close()
            return self._transact(write)

    def _transact(self, write: Callable[[sqlite3.Connection], Any]) -> Any:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            found = write(self._database)
            self._database.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._database.execute("ROLLBACK")
            raise
        return found


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True, shared: bool = False) -> Iterator[bool]:
    """Hold a lock file; without `wait` yields False where another process has it.

    Where lock files cannot be made (read-only), or on systems without flock, it counts as held.
    """
    try:
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
    except (ImportError, OSError):
        yield True
        return
    try:
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)  # which lets go of the lock


def _canonical(configuration: Mapping[str, Any]) -> str:
    return json.dumps(dict(configuration), sort_keys=True)


def read_progress(root: Path | None = None) -> list[Progress]:
    """Return the journal's problems without making or changing anything; [] where there is none."""
    path = (root or cache_root()) / "tuning" / "journal.sqlite3"
    if not path.exists():
        return []
    try:
        journal = Journal.__new__(Journal)
        journal._database = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)
        found = journal.progress()
        journal.close()
        return found
    except sqlite3.Error as error:
        warnings.warn(f"the tuning journal cannot be read ({error})", RuntimeWarning, stacklevel=2)
        return []
