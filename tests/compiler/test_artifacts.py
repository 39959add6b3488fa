"""The artifact store: damage is a miss with one warning, a full disk is a fallback, never a wrong file."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeformer.compiler import artifacts
from edgeformer.compiler.artifacts import ArtifactKey, ArtifactStore
from edgeformer.compiler.errors import BuildError

KEY = ArtifactKey("matmul", "tvm", "8x8", "{}", "x86_64/znver3/avx2", "tvm=1", "abc")
OTHER = ArtifactKey("matmul", "tvm", "9x9", "{}", "x86_64/znver3/avx2", "tvm=1", "abc")
CODE = bytes(range(256)) * 8


def build(folder: Path) -> None:
    (folder / "kernels.so").write_bytes(CODE)
    (folder / "notes.txt").write_text("made by a test")


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "cache")


def read_back(store: ArtifactStore, key: ArtifactKey = KEY) -> tuple[Path | None, int]:
    """(what get returns, how many warnings) of a store opened anew, asked twice."""
    fresh = ArtifactStore(store.root.parent)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder = fresh.get(key)
        assert fresh.get(key) == folder
    return folder, len(caught)


def no_space(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_store_and_get(store: ArtifactStore) -> None:
    assert store.get(KEY) is None
    folder, stored = store.put(KEY, build)
    assert stored and store.get(KEY) == folder and (folder / "kernels.so").read_bytes() == CODE
    assert store.get(OTHER) is None
    assert [fields for _, fields in store.entries()] == [vars(KEY)]
    assert store.verify() == []
    assert read_back(store) == (folder, 0)


def test_any_difference_of_the_key_is_a_miss() -> None:
    digests = {KEY.digest()}
    for name in vars(KEY):
        digests.add(ArtifactKey(**{**vars(KEY), name: "other"}).digest())
    assert len(digests) == 8


def test_entries_belong_to_the_user_alone(store: ArtifactStore) -> None:
    old = os.umask(0)
    try:
        folder, _ = store.put(KEY, build)
    finally:
        os.umask(old)
    for path in (store.root, folder):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def truncate(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


def flip(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 3] ^= 1
    (folder / name).write_bytes(data)


def become_a_folder(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()


def become_a_link(folder: Path, name: str) -> None:
    elsewhere = folder.parent.parent / name
    shutil.move(folder / name, elsewhere)
    (folder / name).symlink_to(elsewhere)


def become_a_pipe(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def empty(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")


FILE_DAMAGE = [
    truncate,
    flip,
    become_a_folder,
    become_a_link,
    become_a_pipe,
    empty,
    lambda f, n: (f / n).unlink(),
]


@pytest.mark.parametrize("name", ["kernels.so", "notes.txt", "manifest.json"])
@pytest.mark.parametrize("damage", FILE_DAMAGE)
def test_a_damaged_file_is_a_miss_and_is_replaced(
    store: ArtifactStore, damage: Callable[[Path, str], None], name: str
) -> None:
    folder, _ = store.put(KEY, build)
    damage(folder, name)
    assert read_back(store) == (None, 1)
    assert [path for path, _ in store.verify()] == [folder]
    again, stored = store.put(KEY, build)
    assert stored and read_back(store) == (again, 0) and store.verify() == []


def add_a_file(folder: Path) -> None:
    (folder / "extra.so").write_bytes(b"x")


def add_a_folder(folder: Path) -> None:
    (folder / "extra").mkdir()


def become_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file")


def become_a_linked_folder(folder: Path) -> None:
    elsewhere = folder.parent.parent / "elsewhere"
    shutil.move(folder, elsewhere)
    folder.symlink_to(elsewhere)


def become_a_dangling_link(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder.parent / "nowhere")


def become_a_link_to_itself(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder)


def let_the_group_write(folder: Path) -> None:
    folder.chmod(0o770)


def name_another_problem(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["key"] = vars(OTHER)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def point_outside(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../outside"] = manifest["files"].pop("kernels.so")
    (folder / "manifest.json").write_text(json.dumps(manifest))


FOLDER_DAMAGE = [
    add_a_file,
    add_a_folder,
    become_a_file,
    become_a_linked_folder,
    become_a_dangling_link,
    become_a_link_to_itself,
    let_the_group_write,
    name_another_problem,
    point_outside,
]


@pytest.mark.parametrize("damage", FOLDER_DAMAGE)
def test_a_damaged_folder_is_a_miss_and_is_replaced(
    store: ArtifactStore, damage: Callable[[Path], None]
) -> None:
    folder, _ = store.put(KEY, build)
    damage(folder)
    assert read_back(store) == (None, 1)
    again, stored = store.put(KEY, build)
    assert stored and again == folder and read_back(store) == (folder, 0)


@pytest.mark.parametrize(
    "text",
    ["null", "[]", "3", '"x"', "{}", "[" * 100_000, '{"schema": 1}', "1" * 5_000, "\x00", '{"schema": NaN}'],
)
def test_a_strange_manifest_is_a_miss(store: ArtifactStore, text: str) -> None:
    folder, _ = store.put(KEY, build)
    (folder / "manifest.json").write_text(text)
    assert read_back(store) == (None, 1)
    assert len(store.verify()) == 1
    for files in (None, [], "kernels.so", {"kernels.so": None}, ["kernels.so", "notes.txt"]):
        (folder / "manifest.json").write_text(json.dumps({"schema": 1, "key": vars(KEY), "files": files}))
        assert read_back(store) == (None, 1)


def test_random_damage_is_never_loaded(store: ArtifactStore) -> None:
    """Some hundred random edits of any file: either nothing changed or it is a miss; never an exception."""
    folder, _ = store.put(KEY, build)
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    rng = random.Random(7)
    misses = 0
    for _ in range(400):
        name = rng.choice(sorted(good))
        data = bytearray(good[name])
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            edit = rng.randrange(4)
            if edit == 0:
                data[at] = rng.randrange(256)
            elif edit == 1:
                del data[at : at + rng.randint(1, 40)]
                data = data or bytearray(b"x")
            elif edit == 2:
                data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
            else:
                data[at:at] = data[rng.randrange(len(data)) :][:20]
        (folder / name).write_bytes(data)
        found, count = read_back(store)
        if found is not None:  # the manifest may be edited without a change of meaning
            assert name == "manifest.json" or data == good[name]
            assert all((found / n).read_bytes() == good[n] for n in good if n != "manifest.json")
        assert count == (found is None)
        misses += found is None
        (folder / name).write_bytes(good[name])
    assert misses > 350 and read_back(store) == (folder, 0)


def test_an_unreadable_entry_is_a_miss(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(KEY, build)

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(artifacts, "_sha256", refuse)
    assert read_back(store) == (None, 1)


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_root_that_others_can_write_is_neither_read_nor_written(store: ArtifactStore, mode: int) -> None:
    store.put(KEY, build)
    store.root.chmod(mode)
    assert read_back(store) == (None, 1)
    with pytest.warns(RuntimeWarning, match="written by others"):
        folder, stored = store.put(OTHER, build)
    assert not stored and not folder.is_relative_to(store.root)


def test_an_unwritable_root_falls_back_to_a_temporary_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    store = ArtifactStore(tmp_path / "file")
    assert store.get(KEY) is None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, stored = store.put(KEY, build)
        second, _ = store.put(OTHER, build)
    assert not stored and first != second and (second / "kernels.so").read_bytes() == CODE
    assert len(caught) == 1 and "kernels are not kept" in str(caught[0].message)
    assert list(store.entries()) == [] and store.verify() == [] and store.prune() == 0


def full_while_building(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    def half(folder: Path) -> None:
        build(folder)
        if folder.is_relative_to(store.root):
            no_space()

    return half


def full_in_manifest(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    monkeypatch.setattr(artifacts.os, "fsync", no_space)
    return build


def full_in_rename(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    monkeypatch.setattr(artifacts.os, "rename", no_space)
    return build


@pytest.mark.parametrize("full", [full_while_building, full_in_manifest, full_in_rename])
def test_a_full_disk_falls_back_to_a_temporary_folder(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, full: Callable
) -> None:
    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning, match="No space left") as caught:
        folder, stored = store.put(KEY, full(store, patch))
    assert len(caught) == 1 and not stored and (folder / "kernels.so").read_bytes() == CODE
    assert list(store.root.iterdir()) == []  # nothing half-written
    assert store.put(KEY, build)[1]


def test_no_space_anywhere_is_a_build_error_that_says_so(store: ArtifactStore) -> None:
    with pytest.warns(RuntimeWarning), pytest.raises(BuildError, match="No space left.*EDGEFORMER_CACHE_DIR"):
        store.put(KEY, no_space)


@pytest.mark.parametrize("error", [BuildError("broken"), KeyboardInterrupt(), ValueError("bug")])
def test_a_failed_build_leaves_nothing(store: ArtifactStore, error: BaseException) -> None:
    def fail(folder: Path) -> None:
        build(folder)
        raise error

    with pytest.raises(type(error)):
        store.put(KEY, fail)
    assert list(store.root.iterdir()) == [] and store.get(KEY) is None


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from edgeformer.compiler.artifacts import ArtifactKey, ArtifactStore
key = ArtifactKey("matmul", "tvm", "8x8", "{{}}", "x86_64/znver3/avx2", "tvm=1", "abc")
def build(folder):
    (folder / "kernels.so").write_bytes(bytes(range(256)) * 8)
    {action}
store = ArtifactStore(Path(sys.argv[1]))
folder, stored = store.put(key, build)
assert stored and store.get(key) == folder and (folder / "kernels.so").exists()
"""


def start(root: Path, action: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", SCRIPT.format(action=action), str(root)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_a_killed_build_leaves_nothing_visible(store: ArtifactStore) -> None:
    assert start(store.root.parent, "os.kill(os.getpid(), signal.SIGKILL)").wait(60) == -9
    assert list(store.entries()) == [] and store.verify() == [] and read_back(store) == (None, 0)
    assert store.put(KEY, build)[1]
    assert store.prune() == 2 and list(store.root.iterdir()) == []  # the entry and what the killed build left


def test_processes_at_once(store: ArtifactStore) -> None:
    processes = [start(store.root.parent, "time.sleep(0.3)") for _ in range(4)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert len(list(store.root.iterdir())) == 1 and read_back(store)[0] is not None


def test_a_good_entry_of_another_process_is_not_taken_away(store: ArtifactStore) -> None:
    """The other process may be between `put` and loading the library."""

    def slow(folder: Path) -> None:
        build(folder)
        if not list(store.entries()):
            store.put(KEY, build)
            inode.append((next(store.entries())[0] / "kernels.so").stat().st_ino)

    inode: list[int] = []
    folder, stored = store.put(KEY, slow)
    assert stored and (folder / "kernels.so").stat().st_ino == inode[0]
    assert len(list(store.root.iterdir())) == 1
