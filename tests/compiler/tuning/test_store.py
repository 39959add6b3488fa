"""What is kept on the disk: journal and records under kills, damage, full disks and foreign hands."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from edgeformer.compiler import records as records_module
from edgeformer.compiler.artifacts import ArtifactKey, ArtifactStore
from edgeformer.compiler.errors import FormatError, UnsupportedError
from edgeformer.compiler.exchange import export, load_records
from edgeformer.compiler.journal import GOOD, Journal, Trial, read_progress
from edgeformer.compiler.lookup import bucket, look_up, stale
from edgeformer.compiler.records import Record, RecordStore, parse, policy

from .conftest import Fake, Folder, make_problem, make_space

# Short in CI; `make torture` runs the long versions.
LONG = os.environ.get("EDGEFORMER_TORTURE") == "1"
KILLS, MUTATIONS, PROCESSES = (200, 10_000, 16) if LONG else (6, 600, 4)
INSERTS = (b"[" * 3000, b"9" * 400, b"null", b"{}", b"-1", b'"\\ud800"', b"1e999")
WORKER = Path(__file__).with_name("worker.py")


def worker(root: Path, *arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(WORKER), str(root), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def test_kills_cost_at_most_the_trial_under_way(tmp_path: Path) -> None:
    """A tuner is killed at random moments again and again; what had ended is there, and it gets done."""
    generator, known = random.Random(0), 0
    for kill in range(KILLS):
        process = worker(tmp_path, "slow", kill)
        assert process.stdout is not None
        process.stdout.readline()  # it has begun
        time.sleep(generator.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        output = process.communicate()[0]
        reported = [int(line.split()[1]) for line in output.splitlines() if line.startswith(b"trials ")]
        journal = Journal(tmp_path)  # which reads what is there: damage would warn
        held = sum(p.trials for p in journal.progress())
        assert held >= max([known, *reported]), "a trial that had ended is lost"
        known = held
        assert RecordStore(tmp_path).problems() == []
        journal.close()
    assert worker(tmp_path, "fast", 0).wait(120) == 0
    assert len(RecordStore(tmp_path, tmp_path).files()) == 3
    # A kill between a record and its mark in the journal leaves the mark out; the record stands.
    assert sum(not p.done for p in read_progress(tmp_path)) <= 1


def test_many_tuners_share_a_folder_and_no_problem_has_two(tmp_path: Path) -> None:
    processes = [worker(tmp_path, "share", i) for i in range(PROCESSES)]
    outputs = [process.communicate(timeout=300)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * PROCESSES, outputs
    trials = [line for output in outputs for line in output.splitlines() if line.startswith("trial ")]
    assert len(trials) == len(set(trials)), "a configuration was tried by two tuners"
    tuned = [line for output in outputs for line in output.splitlines() if line.startswith("tuned ")]
    assert sorted(tuned) == sorted(set(tuned)) and len(tuned) == 8


def test_a_configuration_that_killed_its_tuner_twice_is_bad(folder: Folder) -> None:
    key, configuration = make_problem().key, make_space().default
    starts = [folder.journal.start(key, "title", configuration) for _ in range(3)]
    assert starts == [True, True, False]
    (trial,) = folder.journal.trials(key)
    assert trial.status == "crash" and "died" in trial.note


def test_a_damaged_journal_is_put_aside_and_said_so(tmp_path: Path) -> None:
    Journal(tmp_path).close()
    path = tmp_path / "tuning" / "journal.sqlite3"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.warns(RuntimeWarning, match="damaged"):
        journal = Journal(tmp_path)
    assert journal.durable and journal.start("k", "t", {"a": 1})
    assert len(list(path.parent.glob("journal.damaged-*"))) == 1


class Full:
    """A connection whose transactions fail from some statement on, as on a full or read-only disk."""

    def __init__(self, database: sqlite3.Connection, left: int) -> None:
        self._database, self.left = database, left

    def execute(self, text: str, *arguments: Any) -> Any:
        if text.split()[0] in ("BEGIN", "INSERT", "UPDATE", "COMMIT"):
            self.left -= 1
            if self.left < 0:
                raise sqlite3.OperationalError("database or disk is full")
        return self._database.execute(text, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)


@pytest.mark.parametrize("step", range(0, 40, 4))
def test_a_full_disk_costs_one_warning(folder: Folder, step: int) -> None:
    """From any statement on nothing can be written: tuning goes on in memory, with one warning."""
    folder.journal._database = Full(folder.journal._database, step)  # pyright: ignore
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (outcome,) = folder.tune([make_problem()], Fake())
    assert outcome.state == "tuned" and outcome.trials == len(make_space()) - 1
    assert [str(w.message).count("trials are not kept") for w in caught] == [1]


@pytest.mark.parametrize("call", ["mkdir", "mkstemp", "fdopen", "fsync", "replace"])
def test_records_that_cannot_be_written_cost_one_warning(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    where = {"mkdir": Path, "mkstemp": records_module.tempfile}.get(call, records_module.os)
    monkeypatch.setattr(where, call, refuse)
    given = record()
    with pytest.warns(RuntimeWarning, match="not kept") as caught:
        assert [folder.records.put(given), folder.records.put(given)] == [False, False]
    assert len(caught) == 1
    monkeypatch.undo()
    assert folder.records.files() == [] and folder.records.put(given)
    assert [r for _, r in folder.records.files()] == [given]


def test_a_folder_that_cannot_be_made_keeps_trials_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(RuntimeWarning, match="trials are not kept"):
        journal = Journal(tmp_path / "file")
    assert not journal.durable and journal.start("k", "t", {"a": 1})
    journal.finish("k", Trial({"a": 1}, GOOD, 1.0))
    assert len(journal.trials("k")) == 1


def record(**changes: Any) -> Record:
    problem = make_problem()
    found = problem.wanted.empty({"rows": 8, "ahead": 1024, "place": 3})
    return Record(**{**vars(found), "versions": {"apache-tvm": "0.27.0", "torch": "2.13.0"}, **changes})


def test_a_record_survives_its_file() -> None:
    assert parse(json.loads(record().text())) == record()


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2}, {"schema": True}, {"operator": "../../etc"}, {"operator": ""}, {"form": 3},
        {"phase": "a" * 65}, {"family": "x" * 601}, {"family": "line\nbreak"}, {"device": None},
        {"sizes": {"n": -1}}, {"sizes": {"n": True}}, {"sizes": {"n": 1 << 41}}, {"sizes": []},
        {"sizes": {str(i): 1 for i in range(33)}}, {"threads": -1}, {"threads": 1.5},
        {"seconds": float("nan")},
        {"seconds": float("inf")}, {"seconds": -1}, {"seconds": "1"}, {"source": "guessed"},
        {"configuration": {"rows": [8]}}, {"configuration": {"rows": 1e3}},
        {"configuration": {"rows": "a b"}},
        {"configuration": {"../x": 1}}, {"configuration": {"rows": 1 << 50}}, {"versions": {"tvm": 1}},
        {"versions": "0.27"}, {"extra": 1},
    ],
)  # fmt: skip
def test_what_is_no_record_is_refused(changes: dict[str, Any]) -> None:
    data = json.loads(record().text()) | changes
    with pytest.raises(FormatError):
        parse(data)


def test_mutated_records_raise_nothing_else_and_name_members_only(folder: Folder) -> None:
    """Bytes flipped, cut, doubled, swapped: a file is read right, or left out with a warning."""
    generator, text, space = random.Random(0), record().text().encode(), make_space()
    members = list(space)
    path = folder.root / "records" / "yours" / f"{record().key}.json"
    folder.records.put(record())
    wanted = make_problem().wanted
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(MUTATIONS):
            path.write_bytes(mutated(text, generator))
            store = RecordStore(folder.root, shipped=folder.root / "none")
            for found in look_up(wanted, store.all()):
                part = found.record.configuration
                if part.keys() <= {axis.name for axis in space.axes}:
                    whole = space.complete(part)
                    assert (whole in members) == (not space.refusal(whole))


def test_a_mutated_artifact_is_never_loaded(tmp_path: Path) -> None:
    """Whatever byte of its files changes, the store builds it again."""
    generator, store = random.Random(1), ArtifactStore(tmp_path)
    key = ArtifactKey("op", "form", "spec", "{}", "cpu", "1", "0")
    code = bytes(range(256)) * 4
    folder, _ = store.put(key, lambda aside: void((aside / "kernels.so").write_bytes(code)))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(MUTATIONS if LONG else MUTATIONS // 4):
            name = generator.choice(sorted(files))
            (folder / name).write_bytes(mutated(files[name], generator))
            if store.get(key) is not None:  # a change of the manifest that says the same, or none at all
                assert (folder / "kernels.so").read_bytes() == code
            (folder / name).write_bytes(files[name])
    assert store.get(key) == folder


def void(value: object) -> None:
    """Take a value and return nothing."""


def mutated(data: bytes, generator: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 5))):
        at, kind = generator.randrange(len(out) or 1), generator.randrange(5)
        if kind == 0 and out:
            out[at % len(out)] = generator.randrange(256)
        elif kind == 1:
            del out[at : at + generator.randrange(1, 30)]
        elif kind == 2:
            out[at:at] = out[at : at + generator.randrange(1, 200)]
        elif kind == 3:
            out[at:at] = generator.choice(
                [b"[" * 3000, b"9" * 400, b"null", b"{}", b"-1", b'"\\ud800"', b"1e999"]
            )
        else:
            out[at : at + 1] = bytes(generator.randrange(256) for _ in range(4))
    return bytes(out)


def test_import_takes_records_and_refuses_links_pipes_and_bombs(folder: Folder, tmp_path: Path) -> None:
    folder.records.put(record())
    assert export(tmp_path / "out", store=folder.records) == (1, 1)
    file = tmp_path / "out" / "znver5" / "matmul.json"
    other = RecordStore(tmp_path / "other", shipped=tmp_path / "none")
    assert load_records(tmp_path / "out", other) == load_records(file, other) == 1
    assert [(r, origin) for r, origin in other.all()] == [(record(), "imported")]
    (tmp_path / "link.json").symlink_to(file)
    with pytest.raises(FormatError, match="link"):
        load_records(tmp_path / "link.json", other)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(FormatError, match="plain file"):
        load_records(tmp_path / "pipe.json", other)
    (tmp_path / "bomb.json").write_bytes(b" " * (17 << 20))
    with pytest.raises(FormatError, match="larger"):
        load_records(tmp_path / "bomb.json", other)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(FormatError):
        load_records(tmp_path / "deep.json", other)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "in").symlink_to(tmp_path / "out")
    with pytest.raises(FormatError, match="link"):
        load_records(tmp_path / "linked", other)
    with pytest.raises(FormatError, match="cannot be read"):
        load_records(tmp_path / "nothing.json", other)
    written = {p.name for p in (tmp_path / "other" / "records" / "imported").iterdir()}
    assert written == {f"{record().key}.json"}  # names come from digests, never from what was imported


def test_what_beats_the_default_by_more_than_its_spread_can_be_exported_alone(
    folder: Folder, tmp_path: Path
) -> None:
    given = {"default_seconds": 1.0, "spread": 0.05}
    for name, seconds in (("win", 0.9), ("noise", 0.97), ("default", 1.0)):
        folder.records.put(record(family=name, seconds=seconds, **given))
    folder.records.put(record(family="static", source="static", seconds=0.1, **given))
    assert export(tmp_path / "all", store=folder.records) == (4, 1)
    assert export(tmp_path / "better", store=folder.records, better=True) == (1, 1)
    text = (tmp_path / "better" / "znver5" / "matmul.json").read_text()
    assert [entry["family"] for entry in json.loads(text)["records"]] == ["win"]
    # Another size of the family, where the default stands: without it the winner would be the nearest there.
    folder.records.put(record(family="win", seconds=1.0, sizes={"n": 64, "k": 64, "m": 64}, **given))
    assert export(tmp_path / "both", store=folder.records, better=True) == (2, 1)


def test_look_up_is_exact_then_nearest_and_never_crosses() -> None:
    base = make_problem(m=8).wanted
    near, exact = record(sizes={"n": 64, "k": 64, "m": 16}), record(sizes={"n": 64, "k": 64, "m": 8})
    far = record(sizes={"n": 64, "k": 64, "m": 1 << 14})
    others = [
        record(family="int4 other layout"),
        record(phase="few"),
        record(space="2:a"),
        record(isa="avx2"),
    ]
    found = look_up(base, [(r, "yours") for r in (near, far, exact, *others)])
    assert [f.record for f in found] == [exact, near]
    assert [f.how for f in found] == ["exact", "nearest: m=16"]
    elsewhere = record(sizes=exact.sizes, device="another box")
    stranger = record(sizes=exact.sizes, device="x", mcpu="znver4")
    found = look_up(base, [(r, "imported") for r in (stranger, elsewhere, near)])
    assert [f.record for f in found] == [near, elsewhere, stranger]
    assert "on znver5" in found[1].how and "instruction set" in found[2].how
    found = look_up(base, [(r, "shipped") for r in (stranger, elsewhere, near)])
    assert [f.record for f in found] == [near, elsewhere], "a shipped record is of its micro-architecture"
    two = look_up(base, [(exact, "shipped"), (record(sizes=exact.sizes, threads=4), "yours")])
    assert [f.record.threads for f in two] == [2, 4] and "threads=4" in two[1].how
    assert [bucket(m) for m in (0, 1, 2, 3, 8, 9, 15, 16, 1000)] == [1, 1, 2, 2, 8, 8, 8, 16, 512]


def test_an_axis_added_is_a_miss_and_tool_versions_are_no_key() -> None:
    from edgeformer.compiler.space import Axis

    wider = make_space((Axis("unroll", (1, 2)),))
    assert look_up(make_problem(space=wider).wanted, [(record(), "yours")]) == []
    assert look_up(make_problem().wanted, [(record(), "yours")])[0].how == "exact"
    assert stale(record(), {"apache-tvm": "0.27.9", "torch": "2.99.0"}) == ""
    assert stale(record(), {"apache-tvm": "0.28.0", "torch": "2.13.0"}) == "apache-tvm 0.27.0, now 0.28.0"


def test_the_policy_is_one_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGEFORMER_TUNE", raising=False)
    assert policy() == "cached"
    for name in ("off", "cached", "on"):
        monkeypatch.setenv("EDGEFORMER_TUNE", name)
        assert policy() == name
    monkeypatch.setenv("EDGEFORMER_TUNE", "always")
    with pytest.raises(UnsupportedError, match="EDGEFORMER_TUNE='always'"):
        policy()


def test_unfinished_searches_are_seen_while_they_run(folder: Folder) -> None:
    folder.tune([make_problem()], Fake(), most_trials=2)
    (progress,) = read_progress(folder.root)
    assert (progress.title, progress.trials, progress.done) == (
        "n=64",
        2,
        False,
    ) and progress.best is not None
    assert read_progress(folder.root / "nowhere") == []
