"""The child's side of tuning GPU kernels: a tile is ranked by its machine code, or checked and timed.

Runs in a process of its own (see compiler/child.py): a compiler that never ends or a kernel that faults costs
one trial.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..compiler.backends.triton_cost import cost, problems
from ..compiler.backends.triton_gpu import ARCHITECTURES, compile_kernel, inspect
from ..compiler.errors import BuildError, EdgeFormerError
from ..compiler.journal import GOOD, Trial
from ..compiler.measure import Measured, Sample
from ..kernels.shared.gpu_builds import builds
from ..kernels.shared.gpu_defaults import default

_REPEATS = 10
_FLUSH_BYTES = 256 << 20  # more than a GPU's last cache holds
Configuration = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class GpuRequest:
    """What to do with configurations of a kernel's tile: "trial" (one), "compare" (several, in turn).

    `device` is "" to rank by machine code alone, else where to run ("cuda"; "cpu" is Triton's interpreter at
    small sizes, whose times mean nothing).
    """

    do: str
    tile: str
    arch: str
    device: str = ""
    configurations: tuple[Configuration, ...] = ()
    passes: int = _REPEATS


def answer(request: GpuRequest) -> Trial | Measured:
    """Do what a request asks for. Called by the child for each."""
    if not request.device:
        return _ranked(request)
    found = Runs(request.tile, request.device)
    if request.do == "trial":
        return found.trial(default_of(request), request.configurations[0])
    return found.compare(request.configurations, request.passes)


def default_of(request: GpuRequest) -> dict[str, Any]:
    """Return the tile that a trial is compared with."""
    arch = ARCHITECTURES[request.arch]
    return default(request.tile, arch.family, arch.name)


def _ranked(request: GpuRequest) -> Trial | Measured:
    if request.do == "trial":
        chosen = dict(request.configurations[0])
        before = costs(request.tile, request.arch, tuple(sorted(default_of(request).items())))[0]
        try:
            after, wrong = costs(request.tile, request.arch, tuple(sorted(chosen.items())))
        except BuildError as error:
            return Trial(chosen, "build", note=str(error)[-200:])
        if wrong:
            return Trial(chosen, "pruned", note=wrong)
        return Trial(chosen, GOOD, _mean(after) / _mean(before), _mean(after), 0.0)
    # Both types, so that what wins in one keeps the rules in the other.
    means = [
        _mean([c for dtype in ("fp16", "bf16")
               for c in costs(request.tile, request.arch, tuple(sorted(one.items())), dtype)[0]])
        for one in request.configurations
    ]  # fmt: skip
    times = tuple((mean,) * request.passes for mean in means)
    return Measured(tuple(Sample.of(t) for t in times), times, 0.0, 1)


@functools.lru_cache(maxsize=64)
def costs(
    tile: str, arch: str, configuration: tuple[tuple[str, Any], ...], dtype: str = "fp16"
) -> tuple[list[float], str]:
    """Return the model's cost of every kernel that a tile serves, and the first rule that one breaks."""
    entry, found, wrong = ARCHITECTURES[arch], [], ""
    for kernel in builds(entry, dtype, {tile: dict(configuration)}):
        if kernel.tile == tile:
            code = inspect(compile_kernel(kernel, arch), arch)
            found.append(cost(kernel, entry, code))
            broken = problems(kernel, entry, code)
            wrong = wrong or "".join(f"{kernel.name}: {text}" for text in broken[:1])
    return found, wrong


def _mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(max(v, 1e-30)) for v in values))


class Runs:
    """The problems of one tile on a device, run with configurations in turn."""

    def __init__(self, tile: str, device: str) -> None:
        self.tile, self.device = tile, device
        self.cases = _cases(tile, device)

    def trial(self, before: Configuration, after: Configuration) -> Trial:
        """Check a configuration against fp64 in every case, then time it in turn with the default."""
        from .gpu_tiles import using

        try:
            with using(self.tile, after):
                for case in self.cases:
                    error = case.error()
                    if not error <= case.tolerance:
                        return Trial(dict(after), "wrong", note=f"{case.name}: relative error {error:.1e}")
            found = self.compare((before, after), _REPEATS)
        except EdgeFormerError as error:
            return Trial(dict(after), "build", note=str(error)[-200:])
        old, new = found.samples
        return Trial(dict(after), GOOD, new.seconds / old.seconds, new.seconds, new.spread)

    def compare(self, configurations: Sequence[Configuration], passes: int) -> Measured:
        """Return seconds of configurations, timed in turn: the geometric mean of the cases, pass by pass."""
        per_case = [self._times(case, configurations, passes) for case in self.cases]
        times = tuple(
            tuple(_mean([case[which][i] for case in per_case]) for i in range(passes))
            for which in range(len(configurations))
        )
        return Measured(tuple(Sample.of(t) for t in times), times, 0.0, 1)

    def _times(self, case: Any, configurations: Sequence[Configuration], passes: int) -> list[list[float]]:
        from .gpu_tiles import using

        def call(configuration: Configuration) -> Callable[[], Any]:
            def run() -> Any:
                with using(self.tile, configuration):
                    return case.run()

            return run

        return list(times_of([call(c) for c in configurations], passes, self.device))


@functools.lru_cache(maxsize=1)
def _cases(tile: str, device: str) -> list[Any]:
    import torch

    from .gpu_cases import Box, cases

    torch.manual_seed(0)
    small = device == "cpu"
    box = Box(device, torch.float16 if small else torch.bfloat16, small)
    return list(cases(box, tile=tile))


def times_of(calls: Sequence[Callable[[], Any]], passes: int, device: str) -> list[list[float]]:
    """Return seconds of each call in each pass, in turn, with the last cache overwritten before each."""
    import time

    import torch

    times: list[list[float]] = [[] for _ in calls]
    if device == "cpu":
        for i in range(passes * len(calls)):
            start = time.perf_counter()
            calls[i % len(calls)]()
            times[i % len(calls)].append(time.perf_counter() - start)
        return times
    module = getattr(torch, torch.device(device).type)
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    for at in range(passes + 2):  # two of them warm up: code is compiled and loaded
        for which, call in enumerate(calls):
            flush.zero_()
            begin, end = (module.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            if at >= 2:
                times[which].append(begin.elapsed_time(end) / 1e3)
    return times
