"""Before and after tuning, measured in turn: which records each of the two models sees, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from edgeformer.model import tuned_speed
from edgeformer.model.tuned_speed import ROUNDS, side_by_side
from edgeformer.runtime import recorded

OLD: Any = ("store", ["old"])
NEW: Any = ("store", ["new"])


class Model:
    """One that notes which records it was loaded and run with; tuned, it is twice as fast."""

    threads, context, config = 1, 600, SimpleNamespace(vocab_size=7)

    def __init__(self, log: list[tuple[str, str]], declined: str) -> None:
        self.name, self._log, self.whole_step_declined = recorded.known()[1][0], log, declined
        self.last_run: Any = None

    def memory(self) -> dict[str, int]:
        return {"weights": 1000, "kv": 100, "workspace": 5}

    def generate(self, ids: list[int], max_tokens: int, ignore_eos: bool) -> None:
        self._log.append((str(self.name), str(recorded.known()[1][0])))
        speed = 200.0 if self.name == "new" else 100.0
        self.last_run = SimpleNamespace(prefill_speed=speed * 10, decode_speed=speed)


@pytest.fixture(autouse=True)
def _now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "_read", lambda: NEW)


@pytest.mark.parametrize("declined", ["", "op by op"])
def test_each_model_runs_with_its_own_records_in_turn(declined: str) -> None:
    log: list[tuple[str, str]] = []
    before, after = side_by_side(lambda: Model(log, declined), OLD, {})  # pyright: ignore[reportArgumentType]
    assert before == {"prefill": 1000.0, "decode": 100.0} and after == {"prefill": 2000.0, "decode": 200.0}
    assert all(name == seen for name, seen in log)  # operators that are bound at a call see them, too
    runs = [name for name, _ in log][:: 2 if declined else 1]
    assert len(runs) == 2 * (ROUNDS + 1) and runs[:6] == ["new", "old", "old", "new", "new", "old"]


def test_without_room_for_two_the_old_figures_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned_speed, "available_memory", lambda: 1200)
    log: list[tuple[str, str]] = []
    before, after = side_by_side(lambda: Model(log, ""), OLD, {"decode": 90.0})  # pyright: ignore[reportArgumentType]
    assert before == {"decode": 90.0} and after["decode"] == 200.0
    assert {name for name, _ in log} == {"new"}
