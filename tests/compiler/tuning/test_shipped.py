"""The records in autotune_cache/: sound, worth shipping, and found by the problems that they are about."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeformer.bench.tuned import problems
from edgeformer.compiler.exchange import is_better
from edgeformer.compiler.lookup import look_up
from edgeformer.compiler.records import Record, RecordStore, decode, parse_many
from edgeformer.compiler.target import Target

ROOT = Path(__file__).resolve().parents[3] / "autotune_cache"
FILES = sorted(ROOT.glob("*/*.json"))
CPUS = sorted({path.parent.name for path in FILES})


def shipped(cpu: str) -> list[Record]:
    return [
        record
        for path in FILES
        if path.parent.name == cpu
        for record in parse_many(decode(path.read_bytes()))
    ]


def test_an_installed_package_finds_them(tmp_path: Path) -> None:
    found = [record for record, origin in RecordStore(tmp_path).all() if origin == "shipped"]
    assert len(found) == sum(len(shipped(cpu)) for cpu in CPUS) > 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_file_is_of_one_operator_and_cpu_and_some_record_of_it_wins(path: Path) -> None:
    records = parse_many(decode(path.read_bytes()))
    assert {(r.mcpu, r.operator, r.source) for r in records} == {(path.parent.name, path.stem, "measured")}
    assert len({r.key for r in records}) == len(records)
    for family in {(r.family, r.phase) for r in records}:
        assert any(is_better(r) for r in records if (r.family, r.phase) == family), family


@pytest.mark.parametrize("cpu", CPUS)
def test_each_is_found_by_its_problem_and_is_a_member_of_the_space(cpu: str) -> None:
    records, target = shipped(cpu), Target.parse(cpu)
    found = set()
    for threads in {record.threads for record in records}:
        for _, problem in problems(target, threads):
            for hit in look_up(problem.wanted, [(record, "shipped") for record in records])[:1]:
                configuration = problem.space.complete(hit.record.configuration)
                assert not problem.space.refusal(configuration)
                if hit.how.startswith("exact"):
                    found.add(hit.record.key)
    assert found == {record.key for record in records}
