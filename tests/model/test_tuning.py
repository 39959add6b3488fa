"""Tuning a model: when it is loaded (EDGEFORMER_TUNE=on), by operators, and never inside of a call."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import edgeformer
from edgeformer.cli_tune import show
from edgeformer.compiler.errors import UnsupportedError
from edgeformer.compiler.journal import read_progress
from edgeformer.compiler.records import RecordStore
from edgeformer.compiler.target import detect
from edgeformer.compiler.tuner import GOES_ON, Outcome
from edgeformer.kernels.attention import OPERATOR as ATTENTION
from edgeformer.kernels.attention import AttentionSpec
from edgeformer.model import tuning
from edgeformer.runtime import dispatch, recorded
from edgeformer.runtime.tuning import problem_of, tune_problems


@pytest.fixture(autouse=True)
def _fresh(cache: Path) -> Any:
    recorded.forget()
    yield
    recorded.forget()
    dispatch.forget()


def test_on_tunes_what_has_no_record_while_loading_and_nothing_in_a_call(
    make_gguf: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_gguf("Q4_0", context=600).path
    monkeypatch.setenv("EDGEFORMER_TUNE", "on")
    monkeypatch.setenv("EDGEFORMER_TUNE_BUDGET", "10m")
    monkeypatch.setattr(tuning, "tune_problems", functools.partial(tune_problems, most_trials=2))
    both = tuning._step_problems
    monkeypatch.setattr(tuning, "_step_problems", lambda *given: both(*given)[:1])  # decode alone: time
    with pytest.warns(RuntimeWarning, match="EDGEFORMER_TUNE=on"):
        model = edgeformer.load(path, threads=2)
    assert model.whole_step_declined == ""
    assert sum(p.trials for p in read_progress()) >= 1
    records = [r for r, origin in RecordStore().all() if origin == "yours"]
    assert records and all(r.operator == "decoder_step" for r in records)
    monkeypatch.setattr("edgeformer.runtime.tuning.ChildEvaluator", None)  # a call may start no trial
    model.generate([1, 2, 3], max_tokens=3, ignore_eos=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edgeformer.load(path, threads=2)  # a second load finds the record and tries nothing


def test_a_model_is_timed_again_where_its_kernels_changed(
    make_gguf: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = edgeformer.load(make_gguf("Q4_0").path, whole_step=False, threads=2)
    monkeypatch.setattr(tuning, "load_as_it_is", lambda **ignored: model)
    old, new = {"prefill": 100.0, "decode": 10.0}, {"prefill": 90.0, "decode": 9.0}
    monkeypatch.setattr(tuning, "speeds", lambda model: old)
    monkeypatch.setattr(tuning, "side_by_side", lambda *ignored: (old, new))

    def found(which: int, state: str = "tuned") -> tuning.Tuned:
        """Tune, where the search ends with the default (0) or another member of each space."""

        def search(problems: Any, **ignored: Any) -> list[Outcome]:
            outcomes = []
            for problem in problems:
                changes = ({a.name: a.values[-1]} for a in problem.space.axes if len(a.values) > 1)
                members = (problem.space.default | (change if which else {}) for change in changes)
                chosen = next(member for member in members if not problem.space.refusal(member))
                record = problem.wanted.empty(problem.space.essential(chosen))
                RecordStore().put(record)
                outcomes.append(Outcome(problem, state, 1, record))
            return outcomes

        monkeypatch.setattr(tuning, "tune_problems", search)
        return tuning.tune(model.path, threads=2)

    assert found(0).after == old  # the default won: two loads of one program would show noise
    assert found(1).after == new
    assert found(1).after == old  # it ran with these records before
    assert found(0).after == new
    assert found(1, "kept").after == old


def test_the_table_says_what_did_not_change_and_what_can_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    spec = AttentionSpec(2, 1, 32, 32, kv_dtype="bfloat16", layout="blocked")
    problem = problem_of(ATTENTION, spec, {"tq": 1, "tk": 64}, detect(), 2)
    assert problem is not None
    record = dataclasses.replace(problem.wanted.empty({}), seconds=1e-3, default_seconds=2e-3)
    old, new = {"prefill": 100.0, "decode": 10.0}, {"prefill": 150.0, "decode": 11.0}
    for note, after in (("", old), (GOES_ON, new)):
        show(tuning.Tuned((Outcome(problem, "tuned", 3, record, note),), old, after))
        out, err = capsys.readouterr()
        assert "2.00x" in out and err.startswith("3 trials")
        assert ("the same kernels" in out) == (after == old) and ("1.50x" in out) == (after == new)
        assert ("the search of one problem had ended; --more goes on there" in err) == bool(note)


def test_a_budget_of_the_environment_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuning.on_demand() == 0.0
    monkeypatch.setenv("EDGEFORMER_TUNE", "on")
    assert tuning.on_demand() == 120.0
    monkeypatch.setenv("EDGEFORMER_TUNE_BUDGET", "soon")
    with pytest.raises(UnsupportedError, match="budget"):
        tuning.on_demand()


def test_attention_of_a_model_is_what_its_layers_bind(
    make_gguf: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = edgeformer.load(make_gguf("Q4_0").path, whole_step=False, threads=2)
    bound = []
    given = dispatch._bind

    def remember(operator: Any, spec: Any, form: Any, sizes: Any) -> Any:
        bound.append((operator.name, spec))
        return given(operator, spec, form, sizes)

    monkeypatch.setattr(dispatch, "_bind", remember)
    dispatch.forget()
    from edgeformer.runtime import ops

    monkeypatch.setattr(ops, "_calls", {}, raising=False)
    model.generate(list(range(1, 25)), max_tokens=2, ignore_eos=True)
    seen = {spec for name, spec in bound if name == "attention"}
    assert tuning.attention_spec(model, False, 1) in seen
    assert tuning.attention_spec(model, False, 24) in seen


def test_attention_is_tuned_by_itself(make_gguf: Callable[..., Any], cache: Path) -> None:
    model = edgeformer.load(make_gguf("Q4_0").path, whole_step=False, threads=2)
    spec = tuning.attention_spec(model, False, 1)
    problem = problem_of(ATTENTION, spec, {"tq": 1, "tk": 64}, model.target, 2)
    assert problem is not None
    target = dataclasses.replace(model.target, l3=0)  # small inputs
    problem = problem_of(ATTENTION, spec, {"tq": 1, "tk": 64}, target, 2)
    assert problem is not None
    (outcome,) = tune_problems([problem], seconds=60.0, most_trials=2)
    assert outcome.state == "tuned" and outcome.trials == 2
    assert outcome.record is not None and outcome.record.operator == "attention"


def test_replaced_layers_are_tuned_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setenv("EDGEFORMER_TUNE", "on")
    monkeypatch.setattr(tuning, "_tune_missing", lambda missing: found.extend(missing) or 0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 64, bias=False)).eval()
    edgeformer.optimize(model, "fast", policy="all")
    assert {(p.request.spec.n, p.request.spec.k, p.request.spec.bias) for p in found} == {
        (96, 64, True), (64, 96, False),
    }  # fmt: skip
    assert {p.request.sizes["m"] for p in found} >= {1, 8}
