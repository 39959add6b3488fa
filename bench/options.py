"""What `bench model` measures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..compiler.errors import UnsupportedError
from .work import Test

SCENARIOS = ("single-stream", "multi-stream", "offline")


@dataclass(frozen=True)
class Options:
    """What to measure; the defaults are llama-bench's, except that the median is told.

    `repeats` None: until the ratios are known well enough, at most `seconds` an engine and test.

    `scenarios` are queries of prompt[0] and generate[0] tokens; `quality_tokens` of text are compared with
    fp32 (0: not); `ttft` measures the time to the first token, also of a new process.
    `watts` stands for the device's power where it has no counter. `timeout`: seconds of a child's silence.
    """

    prompt: tuple[int, ...] = (512,)
    generate: tuple[int, ...] = (128,)
    depth: tuple[int, ...] = (0,)
    batch: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = ()
    repeats: int | None = None
    seconds: float = 20.0
    target: str = "auto"
    kv: str = "bf16"
    activation: str = "auto"
    quantize: str | None = None
    whole_step: bool = True
    peers: tuple[str, ...] = ()
    scenarios: tuple[str, ...] = ()
    queries: int = 16
    ttft: bool = True
    quality_tokens: int = 1024
    watts: float | None = None
    timeout: float = 300.0
    strict: bool = False
    resume: bool = False

    def check(self) -> None:
        """Raise UnsupportedError for what makes no sense."""
        from .peers.registry import check_peers

        check_peers(self.peers)
        for name in self.scenarios:
            if name not in SCENARIOS:
                raise UnsupportedError(f"unknown scenario {name!r}; scenarios: {', '.join(SCENARIOS)}")
        if self.scenarios and not (any(self.prompt) and any(self.generate)):
            raise UnsupportedError("a scenario's query needs prompt tokens (-p) and tokens to generate (-n)")
        if self.watts is not None and self.watts <= 0:
            raise UnsupportedError(f"--watts {self.watts:g} is not positive")
        if not self.tests() and not self.scenarios:
            raise UnsupportedError("nothing to measure: -p and -n are both 0")

    def tests(self) -> list[Test]:
        """Return every combination; 0 tokens leave a kind out, batch counts for decode only."""
        found = []
        for depth in self.depth:
            found += [Test("pp", n, depth) for n in self.prompt if n]
            found += [Test("tg", n, depth, batch) for n in self.generate if n for batch in self.batch]
        return found

    @property
    def query(self) -> tuple[int, int]:
        """Prompt and new tokens of a query: the first of each that is not 0; 0 where there is none."""
        return next(filter(None, self.prompt), 0), next(filter(None, self.generate), 0)

    def shape(self) -> tuple[int, int]:
        """Return the context and the batch that engines must hold."""
        lengths = [test.length for test in self.tests()]
        if self.ttft or self.scenarios:
            lengths.append(sum(self.query))
        if self.quality_tokens:
            lengths.append(QUALITY_WINDOW)
        batches = [*self.batch, *(MULTI_STREAM for s in self.scenarios if s != "single-stream")]
        return max(lengths) + 1, max(batches)

    def engine_options(self) -> dict[str, Any]:
        """Return the options of `edgeformer.load`."""
        names = ("target", "kv", "activation", "quantize", "whole_step")
        return {name: getattr(self, name) for name in names}

    def identity(self) -> dict[str, Any]:
        """Return what must be equal for a run to be resumed."""
        return {k: v for k, v in asdict(self).items() if k not in ("strict", "resume", "timeout")}


QUALITY_WINDOW = 512
MULTI_STREAM = 8  # samples of a multi-stream query, by MLPerf's definition
