"""Kernels that are really built and really wrong never win: each is found by the comparison."""

from __future__ import annotations

import dataclasses
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeformer.compiler.child import Child
from edgeformer.compiler.journal import Journal
from edgeformer.compiler.records import RecordStore
from edgeformer.compiler.target import detect
from edgeformer.compiler.tuner import Problem, tune
from edgeformer.kernels.attention import AttentionSpec
from edgeformer.kernels.quant_matmul import QuantMatmulSpec, WeightFormat
from edgeformer.runtime.tuning import ChildEvaluator, problem_of, versions

from . import planted

pytestmark = pytest.mark.real
LONG = os.environ.get("EDGEFORMER_TORTURE") == "1"
ENOUGH = 1 << 30 if LONG else 3  # wrong kernels that have to be found before a test ends
MATMUL = QuantMatmulSpec(48, 64, WeightFormat.int4(), "int8")
# Threads claim blocks of columns; with few values of K one is through with its block before another has come.
MANY = QuantMatmulSpec(48, 1024, WeightFormat.int4(), "int8")
DECODE = AttentionSpec(4, 2, 32, 32, kv_dtype="bfloat16", layout="blocked", mask="causal_lengths")
CASES = [
    ("quant_matmul", MATMUL, {"m": 1}),
    ("attention", DECODE, {"tq": 1, "tk": 64}),
    pytest.param("quant_matmul", MATMUL, {"m": 4}, marks=pytest.mark.slow),
    pytest.param("quant_matmul", MANY, {"m": 32}, marks=pytest.mark.slow),
    pytest.param("attention", DECODE, {"tq": 32, "tk": 64}, marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def _importable(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])


@pytest.fixture
def evaluator() -> Iterator[ChildEvaluator]:
    with ChildEvaluator(trial_seconds=20) as found:
        yield found


def problem(name: str, spec: Any, sizes: dict[str, int]) -> Problem:
    found = problem_of(planted.operators()[name], spec, sizes, detect(), 2)
    assert found is not None
    return dataclasses.replace(found, request=dataclasses.replace(found.request, provider=planted.PROVIDER))


@pytest.mark.timeout(3600 if LONG else 600)
@pytest.mark.parametrize(("name", "spec", "sizes"), CASES)
def test_every_wrong_kernel_is_found(
    name: str, spec: Any, sizes: dict[str, int], evaluator: ChildEvaluator
) -> None:
    """What the comparison takes for right is: on other inputs too it equals the unchanged kernel."""
    given = problem(name, spec, sizes)
    assert evaluator.check(given, given.space.default) == ""
    with Child("planted:count") as counter:
        total = counter.ask(given.request, 60)
    found, harmless, missed = 0, 0, []
    with Child("planted:differs") as judge:
        for number in random.Random(0).sample(range(1, total + 1), total):
            if found == ENOUGH:
                break
            configuration = given.space.default | {"planted": number}
            if evaluator.check(given, configuration):
                found += 1
                continue
            request = dataclasses.replace(given.request, configurations=(configuration,))
            if why := judge.ask(request, 60):
                missed.append(f"change {number}: {why}")
            else:
                harmless += 1
    print(f"{name} {sizes}: {found} found, {harmless} change no result, of {total}")
    assert not missed, missed
    assert found >= min(3, total)


def test_a_wrong_kernel_that_is_faster_does_not_win(cache: Path, evaluator: ChildEvaluator) -> None:
    """The whole loop: built, compared, timed, recorded; kernels that skip work are there to be taken."""
    given = problem("quant_matmul", dataclasses.replace(MATMUL, n=1024, k=1024), {"m": 1})
    space = dataclasses.replace(
        given.space,
        axes=tuple(
            dataclasses.replace(axis, values=tuple(range(40))) if axis.name == "planted" else axis
            for axis in given.space.axes
        ),
    )
    journal, records = Journal(cache), RecordStore(cache, shipped=cache / "none")
    (outcome,) = tune(
        [dataclasses.replace(given, space=space)], evaluator, records, journal, seconds=120.0,
        versions=versions(), most_trials=12,
    )  # fmt: skip
    trials = journal.trials(given.key)
    assert outcome.trials == len(trials) == 12
    assert sum(t.status in ("wrong", "crash") for t in trials) >= 6, [t.status for t in trials]
    assert outcome.record is not None
    chosen = space.complete(outcome.record.configuration)
    assert evaluator.check(given, chosen) == ""
