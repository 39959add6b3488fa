"""A kernel that does nothing for a fixed time: what tuning on other devices is tested with.

A device's process imports this file by its bare name, so it imports nothing of the tests.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from edgeformer.compiler.operator import Form, Operator, Tuning
from edgeformer.compiler.space import Axis, Space

SECONDS = 0.4  # of a null kernel's trial


@dataclasses.dataclass(frozen=True)
class Null:
    """A problem whose kernels do nothing for a fixed time."""

    name: str = "null"

    def key(self) -> str:
        return self.name


class NullWork:
    """Inputs of nothing."""

    nbytes: int = 1
    operations: int = 1
    arithmetic: str = "float"
    copies: int = 1
    area: tuple[int, int]

    def __init__(self, *ignored: Any) -> None:
        import torch

        self._memory = torch.ones(1 << 20, dtype=torch.uint8)
        self.area = (int(self._memory.data_ptr()), 1 << 20)

    def run(self, call: Callable[..., Any], index: int) -> None:
        call()


def null_operators() -> dict[str, Operator]:
    """What a device's process imports: the check of a null kernel takes the time of a trial."""

    def check(*ignored: Any) -> str:
        time.sleep(SECONDS / 3)  # three seeds
        return ""

    tuning = Tuning(lambda *_: "null", lambda *_: ("null", {}), lambda *_: (), NullWork, check)
    space = lambda *_: Space((Axis("number", tuple(range(40))),))  # noqa: E731
    form = Form("null", "none", lambda *_: None, space, lambda *_: lambda: None, None, (), tuning)
    return {"null": Operator("null", Null, lambda: None, (form,))}
