"""The store of built binaries: one owner-only folder an artifact, built aside and renamed into place."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import BuildError

_MANIFEST = "manifest.json"
_SCHEMA = 1


@dataclass(frozen=True)
class ArtifactKey:
    """All that can change the code of an artifact; any difference is a miss."""

    operator: str
    form: str
    spec: str
    configuration: str
    target: str
    versions: str
    sources: str

    def digest(self) -> str:
        """Return the SHA-256 of the whole key."""
        text = json.dumps([_SCHEMA, *self.__dict__.values()])
        return hashlib.sha256(text.encode()).hexdigest()


def cache_root() -> Path:
    """Return the user's cache folder; `EDGEFORMER_CACHE_DIR` overrides."""
    override = os.environ.get("EDGEFORMER_CACHE_DIR")
    if override:
        return Path(override)
    import platformdirs

    return Path(platformdirs.user_cache_dir("edgeformer"))


class ArtifactStore:
    """Artifacts under `root`. A damaged, foreign or unreadable entry is a miss with one warning."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or cache_root()) / "artifacts"
        self._warned = False

    def get(self, key: ArtifactKey) -> Path | None:
        """Return the folder of the artifact for `key`, or None when it has to be built."""
        folder = self._folder(key)
        if not os.path.lexists(folder):
            return None
        problem = self._problem(folder, key)
        if problem:
            self._warn(f"ignoring the cached kernel {folder.name}: {problem}; it is built again")
            return None
        return folder

    def put(self, key: ArtifactKey, build: Callable[[Path], None]) -> tuple[Path, bool]:
        """Build into a folder aside and rename it into place; return (folder, stored).

        When the store cannot be written (full disk, read-only), the artifact is built in a temporary
        folder of this process instead and `stored` is False; BuildError when that is full too. A good
        entry that another process stored meanwhile is kept: it may be loading it. Other errors of
        `build` propagate.
        """
        try:
            self._prepare_root()
            aside = Path(tempfile.mkdtemp(prefix=".building-", dir=self.root))
        except OSError as error:
            return self._build_outside(key, build, error)
        try:
            build(aside)
            self._write_manifest(aside, key)
            final = self._folder(key)
            if os.path.lexists(final):
                if not self._problem(final, key):  # another process was first
                    shutil.rmtree(aside, ignore_errors=True)
                    return final, True
                self._remove(final)
            os.rename(aside, final)
            return final, True
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            final = self._folder(key)
            if os.path.lexists(final) and not self._problem(final, key):  # another process was first
                return final, True
            return self._build_outside(key, build, error)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise

    def entries(self) -> Iterator[tuple[Path, dict[str, str] | None]]:
        """Yield (folder, key fields) of every entry; None instead of the fields when it is damaged."""
        if not self.root.is_dir():
            return
        for folder in sorted(self.root.iterdir()):
            if folder.is_dir() and not folder.name.startswith("."):
                yield folder, self._read_key(folder)

    def verify(self) -> list[tuple[Path, str]]:
        """Return (folder, problem) of every entry that is damaged or not the user's own."""
        found = []
        for folder, fields in self.entries():
            key = ArtifactKey(**fields) if fields else None
            if key is None or self._folder(key) != folder:
                problem = "its manifest is damaged"
            else:
                problem = self._problem(folder, key)
            if problem:
                found.append((folder, problem))
        return found

    def prune(self) -> int:
        """Delete every entry and leftovers of killed builds; return how many folders went."""
        count = 0
        if self.root.is_dir():
            for folder in list(self.root.iterdir()):
                self._remove(folder)
                count += 1
        return count

    def _folder(self, key: ArtifactKey) -> Path:
        return self.root / f"{key.operator}-{key.form}-{key.digest()[:32]}"

    def _prepare_root(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        info = self.root.stat()
        if hasattr(os, "getuid") and (
            info.st_uid != os.getuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        ):
            raise PermissionError(f"{self.root} can be written by others")

    def _write_manifest(self, folder: Path, key: ArtifactKey) -> None:
        files = {p.name: _sha256(p) for p in sorted(folder.iterdir()) if p.name != _MANIFEST}
        text = json.dumps({"schema": _SCHEMA, "key": key.__dict__, "files": files}, indent=1)
        with open(folder / _MANIFEST, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def _read_key(self, folder: Path) -> dict[str, str] | None:
        try:
            if not stat.S_ISREG((folder / _MANIFEST).lstat().st_mode):
                return None
            fields = json.loads((folder / _MANIFEST).read_text())["key"]
            return ArtifactKey(**fields).__dict__
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def _problem(self, folder: Path, key: ArtifactKey) -> str | None:
        try:
            if hasattr(os, "getuid"):
                for path in (self.root, folder):
                    info = path.lstat()
                    if stat.S_ISLNK(info.st_mode) or not stat.S_ISDIR(info.st_mode):
                        return f"{path.name} is not a plain folder"
                    if info.st_uid != os.getuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                        return f"{path.name} belongs to, or can be written by, somebody else"
            if not stat.S_ISREG((folder / _MANIFEST).lstat().st_mode):
                return "its manifest is not a plain file"
            manifest = json.loads((folder / _MANIFEST).read_text())
            if manifest.get("schema") != _SCHEMA or manifest.get("key") != key.__dict__:
                return "its manifest names another problem"
            files = manifest["files"]
            present = {p.name for p in folder.iterdir()} - {_MANIFEST}
            if present != set(files):
                return "files are missing or were added"
            for name, digest in files.items():
                if not stat.S_ISREG((folder / name).lstat().st_mode):  # opening a pipe would wait for ever
                    return f"{name} is not a plain file"
                if _sha256(folder / name) != digest:
                    return f"{name} is damaged"
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return f"it cannot be read ({type(error).__name__})"
        return None

    def _build_outside(
        self, key: ArtifactKey, build: Callable[[Path], None], error: OSError
    ) -> tuple[Path, bool]:
        self._warn(f"kernels are not kept: {self.root} cannot be written ({error})")
        try:
            folder = Path(tempfile.mkdtemp(prefix="edgeformer-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            build(folder)
        except OSError as second:
            raise BuildError(
                f"kernels can be written neither to {self.root} ({error}) "
                f"nor to {tempfile.gettempdir()} ({second}); "
                "free some disk space, or set EDGEFORMER_CACHE_DIR to a folder that can be written"
            ) from second
        return folder, False

    def _remove(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def _warn(self, text: str) -> None:
        if not self._warned:
            warnings.warn(text, RuntimeWarning, stacklevel=3)
            self._warned = True


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
