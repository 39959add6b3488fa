"""Where a step's or a prompt's time goes: every phase of the native program beside its own limit.

The whole-step program is built once more with a time stamp behind each barrier (`decoder_step/tvm_stamped`),
and run as the plain one is. A phase's limit is the slower of its bytes at the read bandwidth and of its
operations at the peak, both measured in the same run; bytes that fit the last-level cache count for nothing.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..compiler.errors import FormatError, UnsupportedError
from .probes import Limits, measure_limits
from .table import markdown_table

REPEATS = 15
WARM_STEPS = 4


@dataclass(frozen=True)
class Phase:
    """One phase of one layer, in seconds since the call began; layer -1 stands before or behind them."""

    name: str
    layer: int
    start: float
    seconds: float


@dataclass(frozen=True)
class Profile:
    """The phases of a call (the one of median length), that length, and that of the plain program."""

    test: str
    phases: list[Phase]
    seconds: float
    plain_seconds: float
    limits: dict[str, float]  # least seconds of each phase's name, over all layers; absent: no limit is known

    def by_name(self) -> list[tuple[str, int, float, float | None]]:
        """Return (phase, how often, seconds, least seconds), the longest first."""
        found: dict[str, list[float]] = {}
        for phase in self.phases:
            found.setdefault(phase.name, []).append(phase.seconds)
        rows = [(name, len(parts), sum(parts), self.limits.get(name)) for name, parts in found.items()]
        return sorted(rows, key=lambda row: -row[2])

    def by_layer(self) -> dict[int, float]:
        """Return each layer's seconds."""
        found: dict[int, float] = {}
        for phase in self.phases:
            found[phase.layer] = found.get(phase.layer, 0.0) + phase.seconds
        return found


@dataclass(frozen=True)
class Call:
    """One stamped call: which function, when by the clock, how long, and its (stamp, cycles) pairs."""

    function: str
    started: float
    seconds: float
    pairs: list[list[int]]


class Stamped:
    """A loaded model whose native program is swapped for the stamped one while a `with` block runs."""

    def __init__(self, model: Any) -> None:
        import torch

        from ..kernels.decoder_step import tvm_stamped
        from ..runtime import launch

        program = getattr(model.step, "program", None)
        if program is None:
            raise UnsupportedError(f"--profile reads the whole-step program: {model.whole_step_declined}")
        if program.target.arch != "x86_64":
            raise UnsupportedError("--profile reads the cycle counter of x86-64; others are not built yet")
        self.program = program
        self.stamps = torch.zeros(tvm_stamped.BUFFER_BYTES // 8, dtype=torch.int64)
        self.skip = tvm_stamped.BARRIER_BYTES // 8
        self.functions: dict[str, Any] = {}
        self.labels: dict[str, list[str]] = {}
        pairs = [("step_1", program.spec, program.configuration)]
        pairs.append(("chunk", program.chunk_spec, program.chunk_configuration))
        for name, spec, configuration in pairs:
            library = launch.load_or_build(
                "decoder_step", tvm_stamped.STAMPED, spec, configuration, program.target
            )
            self.functions[name] = library.function(name)
            self.labels[name] = tvm_stamped.labels(spec, configuration, program.target)[name]

    def __enter__(self) -> Stamped:
        self.last: Call
        self._plain = {"_step_1": self.program._step_1, "_chunk": self.program._chunk}
        self.program._step_1 = self._with_stamps("step_1")
        self.program._chunk = self._with_stamps("chunk")
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self._plain.items():
            setattr(self.program, name, function)

    def _with_stamps(self, name: str) -> Callable[..., Any]:
        from ..kernels.decoder_step.tvm_cpu import ARGUMENTS

        at = [argument for argument, _ in ARGUMENTS].index("barrier")
        function = self.functions[name]

        def call(*arguments: Any) -> Any:
            self.stamps.zero_()
            started = time.perf_counter()
            result = function(*arguments[:at], self.stamps.data_ptr(), *arguments[at + 1 :])
            seconds, count = time.perf_counter() - started, int(self.stamps[self.skip])
            pairs = self.stamps[self.skip + 1 : self.skip + 1 + 2 * count].view(count, 2).tolist()
            self.last = Call(name, started, seconds, pairs)
            return result

        return call

    def phases(self, call: Call, rate: float, behind: str) -> list[Phase]:
        """Return a call's phases; what follows the last stamp is called `behind`."""
        labels, found, layer = self.labels[call.function], [], -1
        begins = max(i for i, label in enumerate(labels) if label == "start") + 1  # a layer's first phase
        first = call.pairs[0][1]
        for (_, before), (number, now) in zip(call.pairs, call.pairs[1:], strict=False):
            if labels[number] != "start":
                layer += number == begins
                found.append(Phase(labels[number], layer, (before - first) / rate, (now - before) / rate))
        inside = (call.pairs[-1][1] - first) / rate
        if call.seconds > inside:
            found.append(Phase(behind, -1, inside, call.seconds - inside))
        return found


def cycles_a_second(calls: Sequence[Call]) -> float:
    """Return the cycle counter's rate: its distance between the first and the last call, over the clock's."""
    first, last = calls[0], calls[-1]
    return (last.pairs[0][1] - first.pairs[0][1]) / (last.started - first.started)


def profile(path: Path, tests: Sequence[Any], options: Any) -> list[Profile]:
    """Profile each test (a prompt, or a step behind some tokens) of a model file."""
    import torch

    from ..model.loading import load
    from ..runtime.threads import set_threads

    context = max(test.length for test in tests) + WARM_STEPS + 1
    threads = options.threads[0] if options.threads else None
    model = load(path, context=context, threads=threads, **options.engine_options())
    stamped = Stamped(model)
    set_threads(model.threads)
    limits = measure_limits(model.threads)
    generator = torch.Generator().manual_seed(0)
    found = []
    for test in tests:
        ids = torch.randint(0, model.config.vocab_size, (1, test.length), generator=generator)
        run = _one_call(model, ids, test)
        plain, calls = [], []
        for _ in range(REPEATS):  # in turns, so that both see the same machine
            plain.append(run())
            with stamped:
                run()
            calls.append(stamped.last)
        rate, behind = cycles_a_second(calls), "head, launch" if test.kind == "tg" else "launch"
        middle = sorted(calls, key=lambda call: call.seconds)[len(calls) // 2]
        phases, seconds = stamped.phases(middle, rate, behind), middle.seconds
        least = phase_limits(model, test, limits.best(measure_limits(model.threads)))
        found.append(Profile(test.name, phases, seconds, statistics.median(plain), least))
    return found


def _one_call(model: Any, ids: Any, test: Any) -> Callable[[], float]:
    """Return a function that runs one step behind `test.depth` tokens, or a prompt, and times it."""

    def run() -> float:
        model.reset()
        if test.depth:
            model.prefill(ids[:, : test.depth])
        if test.kind == "tg":
            for _ in range(WARM_STEPS):  # else the step waits for threads that sleep
                model.decode(ids[:, test.depth])
        start = time.perf_counter()
        if test.kind == "tg":
            model.decode(ids[:, test.depth])
        else:
            model.prefill(ids[:, test.depth :])
        return time.perf_counter() - start

    return run


def phase_limits(model: Any, test: Any, limits: Limits) -> dict[str, float]:
    """Return the least seconds of each phase that multiplies weights or attends, over all layers."""
    from ..compiler.target import detect
    from ..kernels.attention.spec import causal_pairs

    program, layers = model.step.program, model.config.num_layers
    kinds = program.spec.layers
    m = 1 if test.kind == "tg" else test.tokens
    total = model.memory()["weights"]
    cached = total <= detect().l3
    matrix = (limits.matrix_peak or 0.0) if test.kind == "pp" else 0.0
    peak = max(limits.int8_peak or 0.0, matrix)

    def least(nbytes: float, operations: float, rate: float) -> float:
        memory = 0.0 if cached else nbytes / limits.read_bandwidth
        return max(memory, operations / rate if rate else 0.0)

    found: dict[str, float] = dict.fromkeys(("qkv", "o", "gate_up", "down"), 0.0)
    for kind in program.kinds:
        for name in ("qkv", "values", "o", "gate_up", "down"):
            if name != "values" or kinds[kind].values is not None:
                problem = program.spec.matmul(name, kind)
                seconds = least(problem.weight_bytes(), problem.operations(m), peak)
                found["qkv" if name == "values" else name] += seconds
    head = program.spec.matmul("head")
    if test.kind == "tg":
        found["head, launch"] = least(head.weight_bytes(), head.operations(1), peak)
    attention, keys = program.spec.attention(), test.depth + m
    operations = attention.operations(causal_pairs(m, keys))
    rate = max(limits.float_peak or 0.0, matrix)
    found["attention"] = layers * least(attention.kv_bytes(keys), operations, rate)
    return {name: seconds for name, seconds in found.items() if seconds > 0}


def table(profiles: Sequence[Profile]) -> str:
    """Return the profiles as Markdown: phases beside their limits, then the layers."""
    parts = []
    for found in profiles:
        total = found.seconds
        body = []
        for name, count, seconds, least in found.by_name():
            body.append([
                name, str(count), f"{seconds * 1e6:,.1f}", f"{seconds / total:.1%}",
                "" if least is None else f"{least * 1e6:,.1f}",
                "" if least is None else f"{least / seconds:.0%}",
                "" if least is None else f"{(seconds - least) * 1e6:,.1f}",
            ])  # fmt: skip
        head = [found.test, "times", "µs", "share", "limit µs", "of limit", "to win µs"]
        layers = [f"{seconds * 1e6:.0f}" for layer, seconds in sorted(found.by_layer().items()) if layer >= 0]
        parts.append(
            f"{markdown_table(head, body, left=1)}\n\n"
            f"{found.test}: {total * 1e6:,.0f} µs with stamps, {found.plain_seconds * 1e6:,.0f} µs without. "
            f"Layers, µs: {' '.join(layers)}"
        )
    return "\n\n".join(parts)


def write_trace(profiles: Sequence[Profile], out: Path) -> None:
    """Write a Chrome trace (chrome://tracing, Perfetto). Raises FormatError where it cannot be written."""
    events: list[dict[str, Any]] = []
    for number, found in enumerate(profiles):
        events.append({"name": "process_name", "ph": "M", "pid": number, "args": {"name": found.test}})
        events += [
            {
                "name": phase.name if phase.layer < 0 else f"{phase.name} ({phase.layer})", "cat": phase.name,
                "ph": "X", "ts": phase.start * 1e6, "dur": phase.seconds * 1e6, "pid": number, "tid": 0,
                "args": {"layer": phase.layer},
            }
            for phase in found.phases
        ]  # fmt: skip
    try:
        out.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}))
    except OSError as error:
        raise FormatError(f"cannot write {out}: {error.strerror or error}") from error
