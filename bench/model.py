"""Times a whole model as llama-bench does: engines interleaved, limits measured in the same run."""

from __future__ import annotations

import datetime
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..compiler.errors import EdgeFormerError, UnsupportedError
from .device import device, versions
from .probes import Limits, measure_limits
from .work import Test, Work, fractions, work_of_model

SCHEMA_VERSION = 1
HIGHEST_FRACTION = 1.02
PAUSE = 0.05  # seconds between engines: idle threads of one go to sleep before the other starts


class MeasurementError(EdgeFormerError):
    """A measurement contradicts itself, so none of its figures can be trusted."""


class Engine(Protocol):
    """Something that runs a model: EdgeFormer in this process, or a peer in a process of its own."""

    name: str

    def run(self, test: Test) -> float:
        """Run a test from an empty cache and return the seconds of its timed part."""
        ...

    def prepare(self, test: Test) -> dict[str, Any]:
        """Warm up for a test and settle its options; return them."""
        ...

    def work(self) -> Work:
        """Return what the model costs as this engine stores it."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return version, build flags and options."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


@dataclass(frozen=True)
class Options:
    """What to measure; the defaults are llama-bench's, except that the median is told."""

    prompt: tuple[int, ...] = (512,)
    generate: tuple[int, ...] = (128,)
    depth: tuple[int, ...] = (0,)
    batch: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = ()
    repeats: int = 5
    target: str = "auto"
    kv: str = "bf16"
    activation: str = "auto"
    quantize: str | None = None
    whole_step: bool = True
    peers: tuple[str, ...] = ()

    def tests(self) -> list[Test]:
        """Return every combination; 0 tokens leave a kind out, batch counts for decode only."""
        found = []
        for depth in self.depth:
            found += [Test("pp", n, depth) for n in self.prompt if n]
            found += [Test("tg", n, depth, batch) for n in self.generate if n for batch in self.batch]
        if not found:
            raise UnsupportedError("nothing to measure: -p and -n are both 0")
        return found


class EdgeFormerEngine:
    """EdgeFormer itself, in this process."""

    name = "edgeformer"

    def __init__(self, path: Path, threads: int, context: int, options: Options) -> None:
        from ..model.loading import load

        self._options = options
        self.threads = threads
        self.model = load(
            path,
            target=options.target,
            context=context,
            kv=options.kv,
            threads=threads,
            quantize=options.quantize,
            activation=options.activation,
            whole_step=options.whole_step,
        )

    def prepare(self, test: Test) -> dict[str, Any]:
        self.run(test)
        o = self._options
        settled = {"kv": o.kv, "activation": o.activation, "quantize": o.quantize}
        return settled | {"whole_step": o.whole_step and not self.model.whole_step_declined}

    def run(self, test: Test) -> float:
        import torch

        from ..runtime.threads import set_threads

        set_threads(self.threads)
        generator = torch.Generator().manual_seed(len(test.name))
        ids = torch.randint(0, self.model.config.vocab_size, (test.batch, test.length), generator=generator)
        tokens = [ids[:, i].contiguous() for i in range(test.depth, test.length)]
        model = self.model
        model.reset()
        if test.depth:
            model.prefill(ids[:, : test.depth])
        if test.kind == "pp":
            prompt = ids[:, test.depth :].contiguous()
            start = time.perf_counter()
            model.prefill(prompt)
            return time.perf_counter() - start
        start = time.perf_counter()
        for token in tokens:
            model.decode(token)
        return time.perf_counter() - start

    def work(self) -> Work:
        return work_of_model(self.model)

    def describe(self) -> dict[str, Any]:
        return {"version": versions().get("edgeformer", "source"), "target": self.model.target.name}

    def close(self) -> None:
        del self.model


def bench(
    path: Path, options: Options, progress: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Measure a model file and return one row a test and engine; see `require_plausible`."""
    from ..compiler.target import available_cores

    rows: list[dict[str, Any]] = []
    tests = options.tests()
    run_id = uuid.uuid4().hex[:12]
    for threads in options.threads or (available_cores(),):
        engines = open_engines(path, threads, max(test.length for test in tests) + 1, options, progress)
        try:
            rows += _measure(path, engines, tests, threads, options, run_id, progress)
        finally:
            for engine in engines:
                engine.close()
    return rows


def open_engines(
    path: Path, threads: int, context: int, options: Options, progress: Callable[[str], None]
) -> list[Engine]:
    """Load the model in every engine; peers first, so that a missing one is told before any waiting."""
    engines: list[Engine] = []
    batch = max(options.batch)
    try:
        for peer in options.peers:
            if peer != "llama.cpp":
                raise UnsupportedError(f"unknown peer {peer!r}; peers: llama.cpp")
            from .peers.llama_cpp import LlamaCppEngine

            progress(f"loading {path.name} in {peer}")
            engines.append(LlamaCppEngine(path, threads, context, batch))
        progress(f"loading {path.name}")
        engines.insert(0, EdgeFormerEngine(path, threads, context, options))
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    return engines


def _measure(
    path: Path, engines: Sequence[Engine], tests: Sequence[Test], threads: int, options: Options, run_id: str,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:  # fmt: skip
    progress("measuring the machine's limits")
    limits = measure_limits(threads)
    timed: list[tuple[Test, Engine, dict[str, Any], list[float]]] = []
    for test in tests:
        progress(f"{test.name}: warm-up")
        settled = [engine.prepare(test) for engine in engines]
        samples: list[list[float]] = [[] for _ in engines]
        for repeat in range(options.repeats):
            progress(f"{test.name}: repeat {repeat + 1} of {options.repeats}")
            for i in _rotated(len(engines), repeat):
                time.sleep(PAUSE)
                samples[i].append(test.tokens * test.batch / engines[i].run(test))
        timed += [(test, engine, s, x) for engine, s, x in zip(engines, settled, samples, strict=True)]
        time.sleep(PAUSE)
        limits = limits.best(measure_limits(threads))
    return [
        _row(path, test, engine, settled, speeds, limits, run_id) for test, engine, settled, speeds in timed
    ]


def _rotated(count: int, by: int) -> list[int]:
    return [(i + by) % count for i in range(count)]


def _row(
    path: Path,
    test: Test,
    engine: Engine,
    settled: dict[str, Any],
    speeds: list[float],
    limits: Limits,
    run_id: str,
) -> dict[str, Any]:
    speed = statistics.median(speeds)
    fraction = fractions(test, speed, engine.work(), limits, device()["l3_bytes"])
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "engine": engine.name,
        "model": path.name,
        "size": path.stat().st_size,
        "test": test.name,
        "tokens": test.tokens,
        "depth": test.depth,
        "batch": test.batch,
        "threads": limits.threads,
        "tokens_per_second": round(speed, 3),
        "spread": round((max(speeds) - min(speeds)) / 2, 3),
        "samples": [round(s, 3) for s in speeds],
        "limit_fraction": None if fraction.limit is None else round(fraction.limit, 4),
        "limit_fraction_with_attention": None
        if fraction.with_attention is None
        else round(fraction.with_attention, 4),
        "limit": fraction.why,
        "limits": {
            "read_bandwidth": limits.read_bandwidth,
            "int8_peak": limits.int8_peak,
            "float_peak": limits.float_peak,
            "matrix_peak": limits.matrix_peak,
            "rounds": limits.rounds,
            "probes": limits.probes,
        },
        "options": settled,
        "engine_details": engine.describe(),
        "versions": versions(),
        "device": device(),
    }


def require_plausible(rows: Sequence[dict[str, Any]]) -> None:
    """Raise MeasurementError when a row is above the limit that was measured beside it."""
    wrong = [r for r in rows if r["limit_fraction"] is not None and r["limit_fraction"] > HIGHEST_FRACTION]
    if wrong:
        texts = ", ".join(f"{r['engine']} {r['test']} at {r['limit_fraction']:.0%}" for r in wrong)
        raise MeasurementError(
            f"{texts} of the measured limit: the machine's speed changed during the run, or "
            "a probe is too slow. None of these figures count; run it again on a quieter machine"
        )
