"""Turns and pairs: who runs when, which pairs count, how well a ratio is known. No test depends on time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgeformer.bench import turns
from edgeformer.bench.child import EngineError
from edgeformer.bench.paired import Pair, counting, estimate, medians, moved, ratio_of
from edgeformer.bench.table import paired_ratio, render
from edgeformer.bench.turns import AIM, LEAST_ROUNDS, MOST_ROUNDS, Rounds

from .conftest import Pretender


def test_a_peer_runs_between_two_of_ours_and_a_steady_drift_cancels(pretend: Any, engines: dict[str, Any]):
    """The machine gets slower and slower: pairs see 2.0 every time, the medians of the speeds do not."""
    engines["edgeformer"]._seconds = [1.0, 1.2, 1.4, 1.6]
    engines["llama.cpp"]._seconds = [2.2, 2.6, 3.0]
    ours, theirs = pretend(prompt=(0,), generate=(16,))
    assert ours["ratios"]["llama.cpp"] == {
        "ratio": 2.0, "low": 2.0, "high": 2.0, "pairs": [2.0, 2.0, 2.0], "dropped": 0,
        "moved": 0.0, "others": 0.0,
    }  # fmt: skip
    assert theirs["ratios"]["edgeformer"]["ratio"] == 0.5
    assert ours["tokens_per_second"] / theirs["tokens_per_second"] != pytest.approx(2.0)
    assert paired_ratio(ours, theirs) == (2.0, 2.0, 2.0)
    assert "| 2.00 (2.00 to 2.00) |" in render([ours, theirs], "md")


def test_two_peers_share_our_turns_and_the_first_one_changes(
    pretend: Any, engines: dict[str, Any], log: list[str]
):
    engines["openvino"] = Pretender("openvino", [1.0], log)
    rows = pretend(prompt=(0,), generate=(16,), repeats=2, peers=("llama.cpp", "openvino"))
    turns_taken = [name for name in log if not name.startswith(("warm", "limits"))]
    ours = "edgeformer"
    assert turns_taken == [ours, "openvino", ours, "llama.cpp", ours, "llama.cpp", ours, "openvino", ours]
    assert [len(rows[0]["ratios"][name]["pairs"]) for name in ("llama.cpp", "openvino")] == [2, 2]


def test_pairs_during_which_the_machine_changed_are_measured_again(pretend: Any, pair_speeds: list[float]):
    pair_speeds[:] = [100.0, 100.0, 100.0, 80.0, 80.0, 80.0, 80.0]  # the second of the rounds is disturbed
    rows = pretend(prompt=(0,), generate=(16,), repeats=3)
    assert len(rows[1]["samples"]) == 4
    assert (
        rows[0]["ratios"]["llama.cpp"]["dropped"] == 1 and len(rows[0]["ratios"]["llama.cpp"]["pairs"]) == 3
    )


def test_the_part_of_the_limit_is_that_of_the_same_moment(
    pretend: Any, engines: dict[str, Any], pair_speeds: list[float]
):
    """Machine and engine fall to half their speed: by the best limit of the run, most turns seem slow."""
    engines["edgeformer"]._seconds = [1.0, 1.0, 2.0, 2.0, 2.0]
    pair_speeds[:] = [100.0, 100.0, 100.0, 50.0]
    row = pretend(prompt=(0,), generate=(20,), peers=(), repeats=5)[0]
    whole = 20 * (10**9 + 1000 * 10.5) / 5e10  # least seconds of a turn, by the run's best limit
    assert row["limit_fraction"] == pytest.approx(whole / 2, rel=1e-3)
    found = row["of_limit"]
    assert found["ratio"] == found["low"] == found["high"] == pytest.approx(whole, rel=1e-3)
    assert (len(found["samples"]), found["dropped"]) == (4, 1)  # the limit moved during the third
    assert f"| {found['ratio']:.0%} ({found['low']:.0%} to {found['high']:.0%}) |" in render([row], "md")


def test_a_turn_above_its_limit_has_none(pretend: Any, pair_speeds: list[float], engines: dict[str, Any]):
    """Another program had the cores while the limits were probed: no row says 756% of a limit."""
    engines["edgeformer"]._seconds = [0.5]  # 0.8 of LIMITS
    pair_speeds[:] = [100.0, 10.0, 10.0, 10.0, 10.0]
    row = pretend(prompt=(0,), generate=(20,), peers=(), repeats=4)[0]
    assert row["of_limit"] is None and row["limit_fraction"] == pytest.approx(0.8, rel=1e-3)
    assert "| 80% |" in render([row], "md")
    pair_speeds[:] = [100.0, 100.0, 100.0, 100.0, 10.0, 10.0]
    row = pretend(prompt=(0,), generate=(20,), peers=(), repeats=5)[0]
    assert row["of_limit"]["ratio"] == pytest.approx(0.8, rel=1e-3) and row["of_limit"]["dropped"] == 2


def test_the_best_limit_of_a_run_is_that_of_all_its_probes(pretend: Any, pair_speeds: list[float]):
    pair_speeds[:] = [100.0, 120.0, 100.0]
    row = pretend(prompt=(0,), generate=(20,), peers=(), repeats=3)[0]
    assert row["limits"]["read_bandwidth"] == pytest.approx(6e10) and row["limits"]["matrix_peak"] is None


def test_a_matrix_unit_that_jumps_disturbs_prompts_alone(pretend: Any, monkeypatch: pytest.MonkeyPatch):
    speeds = [1.0, 4.0] * 100

    def jumping(threads: int, target: str) -> dict[str, float]:
        return {"memory": 5e10, "int8": 2e12, "bfloat16": speeds.pop() * 1e12}

    monkeypatch.setattr("edgeformer.bench.model.turn_limits", jumping)
    rows = pretend(prompt=(16,), generate=(16,), repeats=3)
    moved = {
        row["test"]: row["ratios"]["llama.cpp"]["moved"] for row in rows if row["engine"] == "edgeformer"
    }
    assert moved == {"pp16": 0.75, "tg16": 0.0}


def test_pairs_during_which_others_worked_are_measured_again(pretend: Any, other_work: list[float]):
    other_work[:] = [0.0, 0.9, 0.05]
    rows = pretend(prompt=(0,), generate=(16,), repeats=3)
    assert rows[0]["ratios"]["llama.cpp"]["dropped"] == 1 and len(rows[1]["samples"]) == 4
    assert rows[0]["ratios"]["llama.cpp"]["others"] == 0.05


def test_a_machine_that_never_rests_has_all_its_pairs_counted(pretend: Any, pair_speeds: list[float]):
    pair_speeds[:] = [100.0, 50.0] * 20
    rows = pretend(prompt=(0,), generate=(16,), repeats=3)
    assert (
        len(rows[0]["ratios"]["llama.cpp"]["pairs"]) == 6 and rows[0]["ratios"]["llama.cpp"]["dropped"] == 0
    )
    assert any("no calm moment" in text for text in rows[0]["warnings"])


def test_a_peer_that_fails_in_its_turn_has_no_ratio(pretend: Any, engines: dict[str, Any]):
    engines["llama.cpp"].fails["tg16"] = EngineError("llama.cpp gave no answer", "timeout")
    ours, theirs = pretend(prompt=(0,), generate=(16,))
    assert ours["ratios"] == {} and ours["status"] == "ok" and len(ours["samples"]) == 4
    assert theirs["status"] == "timeout" and theirs["ratios"] == {}


def test_short_tests_are_repeated_within_a_turn(
    pretend: Any, engines: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(turns, "TURN", 1.0)
    engines["edgeformer"]._seconds = [0.3, 0.5]
    rows = pretend(prompt=(0,), generate=(16,), peers=(), repeats=1)
    assert rows[0]["samples"] == [pytest.approx(16 * 3 / 1.1, rel=1e-3)]


def test_rounds_end_when_enough_is_known():
    fixed = Rounds(5, 0.0)
    assert not fixed.enough(4, 4, True, 1e9) and fixed.enough(5, 5, False, 0.0)
    assert not fixed.enough(9, 4, True, 0.0) and fixed.enough(10, 0, False, 0.0)
    adaptive = Rounds(None, 60.0)
    assert not adaptive.enough(LEAST_ROUNDS - 1, LEAST_ROUNDS - 1, True, 1e9)
    assert not adaptive.enough(LEAST_ROUNDS, LEAST_ROUNDS, False, 59.0)
    assert adaptive.enough(LEAST_ROUNDS, LEAST_ROUNDS, True, 1.0)
    assert not adaptive.enough(LEAST_ROUNDS, LEAST_ROUNDS - 1, True, 59.0)
    assert adaptive.enough(LEAST_ROUNDS, 0, False, 61.0) and adaptive.enough(MOST_ROUNDS, 0, False, 0.0)


def test_an_adaptive_run_stops_early_where_nothing_varies(pretend: Any, engines: dict[str, Any]):
    engines["edgeformer"]._seconds = engines["llama.cpp"]._seconds = [1.0]
    rows = pretend(prompt=(0,), generate=(16,), repeats=None)
    assert len(rows[1]["samples"]) == LEAST_ROUNDS


def test_the_probes_that_differ_most_count():
    assert moved({"compute": 100.0, "memory": 50.0}, {"compute": 95.0, "memory": 60.0}) == pytest.approx(
        1 / 6
    )


def test_which_pairs_count():
    calm, disturbed = Pair(1.0, 2.0, 0.05), Pair(1.0, 9.0, 0.5)
    assert counting([calm] * 3 + [disturbed]) == [calm] * 3
    assert len(counting([calm] * 2 + [disturbed])) == 3
    found = ratio_of([calm] * 3 + [disturbed])
    assert found is not None and (found.middle, found.dropped) == (2.0, 1)
    assert ratio_of([]) is None


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Of 200 series of 40 independent ratios around 2, about 95% of the intervals hold 2; none is a point."""
    rng = np.random.default_rng(1)
    found = [estimate(list(2.0 * np.exp(0.1 * rng.standard_normal(40)))) for _ in range(200)]
    held = sum(e.low <= 2.0 <= e.high for e in found) / len(found)
    assert 0.88 < held <= 1.0
    assert all(AIM < e.half_width < 0.1 for e in found)


def test_disturbances_longer_than_a_pair_widen_the_interval():
    rng = np.random.default_rng(2)
    noise = rng.standard_normal(30)
    lone, lasting = estimate(list(1 + 0.05 * noise)), estimate(list(1 + 0.05 * np.repeat(noise[:10], 3)))
    assert lasting.half_width > 1.2 * lone.half_width
    assert (medians([1.0, 2.0, 4.0]) == medians([1.0, 2.0, 4.0])).all()
