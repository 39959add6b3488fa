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
    """One that notes what records its step was made with, or sees in a run; new ones are twice as fast."""

    threads, context, config = 1, 600, SimpleNamespace(vocab_size=7)
    decoder, target, kv = "decoder", "target", "bf16"

    def __init__(self, log: list[tuple[str, str]], declined: str) -> None:
        self.step, self._log, self.whole_step_declined = made_now(), log, declined
        self.cache: list[int] | None = None
        self.last_run: Any = None

    def generate(self, ids: list[int], max_tokens: int, ignore_eos: bool) -> None:
        self.cache = [] if self.cache is None else self.cache
        seen = made_now() if self.whole_step_declined else self.step
        self._log.append((seen, str(id(self.cache))))
        speed = 200.0 if seen == "new" else 100.0
        self.last_run = SimpleNamespace(prefill_speed=speed * 10, decode_speed=speed)


def made_now() -> str:
    """Return the name of the records that are seen."""
    return str(recorded.known()[1][0])


@pytest.mark.parametrize("declined", ["", "op by op"])
def test_one_load_runs_with_the_records_of_before_and_of_now_in_turn(
    declined: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "_read", lambda: NEW)
    monkeypatch.setattr(tuned_speed, "compile_decoder", lambda *given, check: (made_now(), ""))
    log: list[tuple[str, str]] = []
    before, after = side_by_side(Model(log, declined), OLD)  # pyright: ignore[reportArgumentType]
    assert before == {"prefill": 1000.0, "decode": 100.0} and after == {"prefill": 2000.0, "decode": 200.0}
    runs = [name for name, _ in log[1:]][:: 2 if declined else 1]
    assert len(runs) == 2 * (ROUNDS + 1) and runs[:6] == ["new", "old", "old", "new", "new", "old"]
    assert len({cache for _, cache in log}) == 1
