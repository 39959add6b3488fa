"""The limits of the machine, measured in the same run as the models: bytes read and operations a second."""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

PROBE_BYTES = 256 << 20  # at least; and EVICTING last-level caches, which must not answer for the memory
REPEATS = 5
# Each limit's name in what `turn_limits` returns.
TURN_NAMES = {
    "read_bandwidth": "memory", "int8_peak": "int8", "float_peak": "float", "matrix_peak": "bfloat16"
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What the machine can do with so many threads, by the best of the probes that ran.

    `read_bandwidth` is in bytes a second. `int8_peak` and `float_peak` (fp32, of vectors) and `matrix_peak`
    (bf16, of a matrix unit) are operations a second (a
    multiply and an add are two) of loops that touch registers only; None where no such loop exists
    here, since anything slower would not be a limit. `probes` has every probe's best figure.
    """

    threads: int
    read_bandwidth: float
    int8_peak: float | None
    float_peak: float | None
    matrix_peak: float | None = None
    rounds: int = 1
    probes: dict[str, float] = field(default_factory=dict)

    def at(self, now: Mapping[str, float]) -> Limits:
        """Return these limits with what `turn_limits` told of a moment in their place."""
        found = {name: now[short] for name, short in TURN_NAMES.items() if short in now}
        return replace(self, **{name: v for name, v in found.items() if getattr(self, name) is not None})

    def raised(self, moments: Sequence[Mapping[str, float]]) -> Limits:
        """Return these limits, or what `turn_limits` told of a moment where that is higher."""
        highest = {short: max(now[short] for now in moments) for short in (moments[0] if moments else ())}
        there = self.at(highest)
        names = {name: _higher(getattr(self, name), getattr(there, name)) for name in TURN_NAMES}
        return replace(self, **names)

    def best(self, other: Limits) -> Limits:
        """Return the higher figure of each probe of two rounds."""
        assert self.threads == other.threads
        names = self.probes.keys() | other.probes.keys()
        return Limits(
            threads=self.threads,
            read_bandwidth=max(self.read_bandwidth, other.read_bandwidth),
            int8_peak=_higher(self.int8_peak, other.int8_peak),
            float_peak=_higher(self.float_peak, other.float_peak),
            matrix_peak=_higher(self.matrix_peak, other.matrix_peak),
            rounds=self.rounds + other.rounds,
            probes={n: max(self.probes.get(n, 0.0), other.probes.get(n, 0.0)) for n in sorted(names)},
        )


def measure_limits(
    threads: int, probe_bytes: int | None = None, repeats: int = REPEATS, target: str = "auto"
) -> Limits:
    """Run every probe on `threads` threads: our read loop, torch.sum, a copy counted twice, dot loops.

    The loops use the instructions of `target` where it is a CPU of this host's kind; "auto": what is in use.
    """
    import torch

    from ..compiler.errors import BuildError
    from ..compiler.measure import EVICTING
    from ..compiler.target import detect
    from ..runtime import probes as native
    from ..runtime.threads import set_threads

    probe_bytes = probe_bytes or max(PROBE_BYTES, EVICTING * detect().l3)
    set_threads(threads)
    source = torch.ones(probe_bytes // 4, dtype=torch.float32)
    copy = torch.empty_like(source)
    probes = {
        "torch_sum": source.nbytes / _shortest(source.sum, repeats),
        "copy_twice": 2 * source.nbytes / _shortest(functools.partial(copy.copy_, source), repeats),
    }
    del source, copy
    try:
        with loops_of(target):
            probes["read_bandwidth"] = native.read_bandwidth(threads, probe_bytes >> 20)
            for name in ("int8_dot_peak", "float_dot_peak", "matrix_peak"):
                if (found := getattr(native, name)(threads)) is not None:
                    probes[name] = found
    except BuildError as error:
        warnings.warn(f"limits are torch's only, the compiled probes were not built: {error}", stacklevel=2)
    readers = ("torch_sum", "copy_twice", "read_bandwidth")
    return Limits(
        threads=threads,
        read_bandwidth=max(probes[name] for name in readers if name in probes),
        int8_peak=probes.get("int8_dot_peak"),
        float_peak=probes.get("float_dot_peak"),
        matrix_peak=probes.get("matrix_peak"),
        probes=probes,
    )


@contextlib.contextmanager
def loops_of(target: str) -> Iterator[None]:
    """Let compiled loops use the instructions of `target` where it is a CPU of this host's kind."""
    from ..compiler.target import Target, detect
    from ..runtime import dispatch

    named = None if target == "auto" else Target.parse(target)
    if named is None or named.arch != detect().arch:
        yield
        return
    dispatch.use_target(named)
    try:
        yield
    finally:
        dispatch.use_target(None)


def _shortest(call: Callable[[], object], repeats: int) -> float:
    call()  # pages in, threads awake
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _higher(a: float | None, b: float | None) -> float | None:
    return max((x for x in (a, b) if x is not None), default=None)
