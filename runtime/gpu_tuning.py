"""The parent's side of tuning GPU kernels: problems by architecture, trials in a child, records."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..compiler.backends import triton_gpu
from ..compiler.backends.triton_gpu import ARCHITECTURES, Architecture
from ..compiler.child import Child, ChildError
from ..compiler.devices import device as known_device
from ..compiler.errors import BuildError, DeviceError, TargetError, UnsupportedError
from ..compiler.journal import Trial
from ..compiler.measure import Measured
from ..compiler.tuner import Event, Outcome, OutOfTime, Problem
from ..kernels.shared.gpu_spaces import OPERATORS, space
from . import gpu_tiles
from .gpu_trial import GpuRequest

_FIRST_SECONDS = 120.0  # of a problem's first trial: torch, Triton, and the default of every kernel
_TRIAL_SECONDS = 60.0  # a tile that compiles for longer is none to ship


def architecture(target: str) -> tuple[Architecture, str, int]:
    """Return (architecture, the device that it runs on here or "", bytes of its last cache).

    Raises DeviceError when `target` is a device ("cuda") and none is there, TargetError for a GPU that Triton
    kernels do not cover.
    """
    if target in triton_gpu.DEVICES:
        return (*_present(target), _cache_of(target))
    named = known_device(target)
    name = named.gpu.arch if named and named.gpu and target not in ARCHITECTURES else target
    found = triton_gpu.architecture(name)
    try:
        here, device = _present("cuda")
    except DeviceError:
        return found, "", 0
    return (found, device, _cache_of(device)) if here == found else (found, "", 0)


def _present(device: str) -> tuple[Architecture, str]:
    import torch

    module = getattr(torch, device, None)
    if module is None or not module.is_available():
        raise DeviceError(
            f"PyTorch sees no {device} device here; `--target gfx1151` or another architecture is ranked by "
            f"its machine code instead (known: {', '.join(ARCHITECTURES)})"
        )
    from .gpu import architecture_of

    found = architecture_of(torch.device(device))
    if found.name not in ARCHITECTURES:
        raise TargetError(f"{found.name} devices are not tuned yet; kernels run there with their defaults")
    return found, device


def _cache_of(device: str) -> int:
    import torch

    return torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else 0


def problems(arch: Architecture, operators: Sequence[str], device: str = "", l2: int = 0) -> list[Problem]:
    """Return a problem for every kernel's tile of some operators ((): all). Raises UnsupportedError."""
    if unknown := set(operators) - set(OPERATORS.values()):
        known = ", ".join(sorted(set(OPERATORS.values())))
        raise UnsupportedError(f"unknown operators {', '.join(sorted(unknown))}; on a GPU: {known}")
    found = []
    for tile, operator in OPERATORS.items():
        if operators and operator not in operators:
            continue
        whole = space(tile, arch)
        request = GpuRequest("trial", tile, arch.name, device)
        found.append(Problem(f"{tile} on {arch.name}", gpu_tiles.wanted(tile, arch, l2), whole, request))
    return found


class GpuEvaluator:
    """Trials of tiles in a child process (see compiler.tuner.Evaluator): measured on a device, or static."""

    def __init__(self, device: str = "") -> None:
        self.source = "measured" if device else "static"
        self._child = Child("edgeformer.runtime.gpu_trial:answer", environment={"EDGEFORMER_TUNE": "off"})
        self._prepared = ("", 0)

    def trial(self, problem: Problem, configuration: Mapping[str, Any], seconds: float = math.inf) -> Trial:
        """Rank or time a configuration; what goes wrong is its Trial's status."""
        try:
            return self._ask(problem, "trial", (configuration,), seconds)
        except ChildError as error:
            return Trial(dict(configuration), error.kind, note=str(error))

    def compare(
        self, problem: Problem, configurations: Sequence[Mapping[str, Any]], passes: int,
        seconds: float = math.inf,
    ) -> Measured:  # fmt: skip
        """Rank or time configurations in turn. Raises BuildError when the child fails."""
        try:
            return self._ask(problem, "compare", tuple(configurations), seconds, passes)
        except ChildError as error:
            raise BuildError(f"{problem.title}: {error}") from error

    def close(self) -> None:
        """End the child."""
        self._child.close()

    def __enter__(self) -> GpuEvaluator:
        return self

    def __exit__(self, *ignored: object) -> None:
        self.close()

    def _ask(
        self, problem: Problem, do: str, configurations: tuple[Mapping[str, Any], ...], seconds: float,
        passes: int = 10,
    ) -> Any:  # fmt: skip
        request = dataclasses.replace(problem.request, do=do, configurations=configurations, passes=passes)
        timeout = len(configurations) * _TRIAL_SECONDS * (2 if do == "compare" else 1)
        state = (problem.title, self._child.starts)
        if state != self._prepared:
            timeout += _FIRST_SECONDS
        try:
            return self._child.ask(request, max(0.0, min(timeout, seconds)))
        except ChildError as error:
            if error.kind == "hang" and seconds < timeout:
                raise OutOfTime(f"{problem.title}: the time is over") from error
            raise
        finally:
            self._prepared = (problem.title, self._child.starts)


def tune(
    target: str, operators: Sequence[str], *, seconds: float, more: bool = False,
    progress: Callable[[Event], None] | None = None, root: Path | None = None, most_trials: int = 1 << 30,
) -> list[Outcome]:  # fmt: skip
    """Tune the GPU kernels of some operators for `target`: on that device, else by machine code."""
    from .tuning import tune_problems

    if problem := triton_gpu.available():
        raise UnsupportedError(problem)
    arch, device, l2 = architecture(target)
    found = problems(arch, operators, device, l2)
    with GpuEvaluator(device) as evaluator:
        outcomes = tune_problems(
            found, seconds=seconds, root=root, more=more, most_trials=most_trials, progress=progress,
            evaluator=evaluator,
        )  # fmt: skip
    gpu_tiles.forget()
    return outcomes
