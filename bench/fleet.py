"""The engines of a run: opened when first needed, reopened after a crash, given up after a second one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ..compiler.errors import EdgeFormerError, UnsupportedError
from .child import ChildEngine, EngineError, Patience, Shape
from .options import Options

OURS = "edgeformer"
LIVES = 2
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Problem:
    """Why an engine has no figure: status "missing", "failed" or "timeout", and a text that helps."""

    status: str
    text: str


class Fleet:
    """EdgeFormer first, then the peers in the order that was asked for."""

    def __init__(
        self, path: Path, shape: Shape, options: Options, progress: Callable[[str], None] = lambda _: None
    ) -> None:
        self.path, self.shape, self.options, self.progress = path, shape, options, progress
        self.names = (OURS, *dict.fromkeys(options.peers))
        self.problems: dict[str, Problem] = {}
        self._engines: dict[str, ChildEngine] = {}
        self._crashes: dict[str, int] = {}

    def open(self, name: str, shape: Shape | None = None) -> ChildEngine:
        """Start another process of an engine."""
        return open_engine(name, self.path, shape or self.shape, self.options)

    def engine(self, name: str) -> ChildEngine | None:
        """Return a running engine, None where it has a lasting problem. Raises if EdgeFormer cannot load."""
        if name in self.problems:
            return None
        found = self._engines.get(name)
        if found is not None and found.alive:
            return found
        self.progress(f"loading {self.path.name} in {name}")
        try:
            if found is not None:
                found.open()
            else:
                found = self._engines[name] = self.open(name)
        except UnsupportedError as error:
            if name == OURS:
                raise
            self._give_up(name, Problem("missing", str(error)))
        except EngineError as error:
            if name == OURS:
                raise
            self._give_up(name, Problem(error.status, str(error)))
        return None if name in self.problems else found

    def attempt(self, name: str, call: Callable[[ChildEngine], Answer]) -> Answer | Problem:
        """Return `call(engine)`, or why there is no answer; the run goes on either way."""
        engine = self.engine(name)
        if engine is None:
            return self.problems[name]
        try:
            return call(engine)
        except EdgeFormerError as error:
            problem = Problem(getattr(error, "status", "failed"), str(error))
            self.progress(f"{name}: {problem.text}")
            if not engine.alive:
                self._crashes[name] = self._crashes.get(name, 0) + 1
                if self._crashes[name] >= LIVES:
                    self._give_up(name, replace(problem, text=f"{problem.text} (given up)"))
            return problem

    def processes(self) -> list[int]:
        """Return the process ids of all children."""
        return [pid for engine in self._engines.values() for pid in engine.processes]

    def close(self) -> None:
        """End all engines."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()

    def _give_up(self, name: str, problem: Problem) -> None:
        self.problems[name] = problem
        self.progress(f"{name} is left out: {problem.text}")


def open_engine(name: str, path: Path, shape: Shape, options: Options) -> ChildEngine:
    """Start an engine by name; the test suite puts its own in here."""
    patience = Patience(load=max(300.0, options.timeout), answer=options.timeout)
    if name == OURS:
        from .engine import EdgeFormerEngine

        engine: Any = EdgeFormerEngine(path, shape, patience, **options.engine_options())
    else:
        from .peers.registry import open_peer

        engine = open_peer(name, path, shape, patience, options.target)
    return engine
