"""The child's side of tuning: build a configuration aside, check it against the reference, time it.

Runs in a process of its own (see compiler/child.py): whatever a candidate does ends here.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..compiler.artifacts import cache_root
from ..compiler.backends import tvm_llvm
from ..compiler.errors import BuildError
from ..compiler.journal import GOOD, NOISY, Trial, locked
from ..compiler.measure import EVICTING, Measured, Sample, measure
from ..compiler.operator import Operator
from ..compiler.target import Target
from . import threads

SEEDS = (0, 1, 2)
_PASSES = 7
_PROBE_BYTES = 32 << 20
_LEAST_BYTES = 64 << 20
ENDED_WITHIN = 0.8  # of a comparison's time: the last pass has to end, too
_MORE_SPILLS = 24  # than the default's: such a kernel was never faster


@dataclasses.dataclass(frozen=True)
class Request:
    """What to do: "trial" (one configuration), "compare" (several, `passes` times), "check", "static", or
    "limits" (as "compare", with this machine's limits in turn), or "build" (return a library's bytes).

    `provider` is "module:function", which returns the operators by name. `small` leaves out what would make
    inputs larger than the caches. `libraries` are (configuration as JSON, bytes, spills) that were built
    elsewhere. `seconds` are there for building and timing: what is slow gets fewer passes.
    """

    do: str
    operator: str
    form: str
    spec: Any
    sizes: Mapping[str, int]
    target: Target
    threads: int
    configurations: tuple[Mapping[str, Any], ...] = ()
    passes: int = _PASSES
    libraries: tuple[tuple[str, bytes, int], ...] = ()
    provider: str = "edgeformer.runtime.registry:tunable"
    seconds: float = math.inf

    @property
    def problem(self) -> str:
        """What has to be prepared anew when it changes."""
        return f"{self.operator} {self.spec!r} {dict(self.sizes)} {self.target.key()} {self.threads}"


def answer(request: Request) -> Any:
    """Do what a request asks for. Called by the child for each."""
    end = time.monotonic() + request.seconds
    bench = _bench(request)
    bench.libraries.update({text: (data, spills) for text, data, spills in request.libraries})
    if request.do == "build":
        return bench.library(dict(request.configurations[0]))
    if request.do == "trial":
        return bench.trial(request.configurations[0])
    if request.do == "compare":
        return bench.compare(request.configurations, request.passes, end)
    if request.do == "limits":
        return bench.limits(request.configurations, request.passes)
    if request.do == "check":
        return bench.check(request.configurations[0])
    assert request.do == "static", request.do
    return bench.static(request.configurations[0])


_held: dict[str, Any] = {}


def _bench(request: Request) -> Bench:
    """Return the workbench of the request's problem; one is held."""
    if _held.get("problem") != request.problem:
        _held.clear()
        _held.update(problem=request.problem, bench=Bench(request))
    return _held["bench"]


@dataclasses.dataclass(frozen=True)
class Limited:
    """Samples of configurations, and what the machine did in the same passes: bytes a second ("read") and
    operations a second by arithmetic. `moved` is how far the read bandwidth went in all.
    """

    samples: tuple[Sample, ...]
    limits: dict[str, float]
    moved: float
    nbytes: int
    operations: int
    arithmetic: str
    copies: int


class Bench:
    """One problem's inputs, references and built candidates."""

    def __init__(self, request: Request) -> None:
        module, _, name = request.provider.partition(":")
        operator: Operator = getattr(importlib.import_module(module), name)()[request.operator]
        form = operator.form(request.form)
        assert form.tuning is not None
        self.operator, self.form, self.tuning = operator, form, form.tuning
        self.spec, self.sizes, self.target = request.spec, request.sizes, request.target
        self.phase = self.tuning.phase(self.spec, self.sizes)
        self.default = form.space(self.spec, self.target)[0]
        threads.set_threads(request.threads)
        self.libraries: dict[str, tuple[bytes, int]] = {}  # built elsewhere, by configuration
        self._workload: Any = None
        self._calls: dict[str, Callable[..., Any]] = {}
        self._at = 0

    def trial(self, configuration: Mapping[str, Any]) -> Trial:
        """Build, check, and time a configuration in turn with the default."""
        given = dict(configuration)
        try:
            call, spills = self._build(given)
            base, base_spills = self._build(self.default)
        except BuildError as error:
            return Trial(given, "build", note=str(error))
        if spills > base_spills + _MORE_SPILLS:
            return Trial(given, "pruned", note=f"{spills} spills, the default has {base_spills}")
        if problem := self._wrong(call):
            return Trial(given, "wrong", note=problem)
        found = self._measure([base, call], _PASSES)
        before, after = found.samples
        note = "" if found.steady else f"the machine's speed moved by {found.moved:.0%}"
        status = GOOD if found.steady else NOISY
        return Trial(given, status, after.seconds / before.seconds, after.seconds, after.spread, note)

    def compare(
        self, configurations: tuple[Mapping[str, Any], ...], passes: int, end: float = math.inf
    ) -> Measured:
        """Time configurations in turn, until `end` (time.monotonic) at most where they are slow."""
        return self._measure([self._build(dict(c))[0] for c in configurations], passes, end)

    def limits(self, configurations: tuple[Mapping[str, Any], ...], passes: int) -> Limited:
        """Time configurations, reading of their inputs, and the target's arithmetic, all in turn."""
        from . import dispatch, probes

        calls = [self._build(dict(c))[0] for c in configurations]
        work, piece = self._work(), min(self._work().area[1], _PROBE_BYTES)
        runs: list[Callable[[int], Any]] = [lambda i, call=call: work.run(call, i) for call in calls]
        before = dispatch._target
        dispatch.use_target(self.target)  # whose instructions the peaks are of
        try:
            peaks = probes.rounds(torch.get_num_threads())
            read = probes.reader(torch.get_num_threads())
            runs.append(lambda i: self._read(read, piece))
            runs += [lambda i, run=run: run() for run, _ in peaks.values()]
            with locked(cache_root() / "tuning" / "measuring.lock"):
                # The turn behind the arithmetic finds the clock as that left it: it does not count.
                found = measure([runs[0], *runs], passes, probe=self._probe)
        finally:
            dispatch.use_target(before)
        count, samples = len(calls), found.samples[1:]
        limits = {"read": piece / samples[count].seconds}
        for (name, (_, operations)), sample in zip(peaks.items(), samples[count + 1 :]):
            limits[name] = operations / sample.seconds
        about = (work.nbytes, work.operations, work.arithmetic, work.copies)
        return Limited(samples[:count], limits, found.moved, *about)

    def _read(self, read: Callable[[int, int], Any], piece: int) -> None:
        """Read a piece of the inputs that was not read lately."""
        address, nbytes = self._work().area
        self._at = self._at + piece if self._at + 2 * piece <= nbytes else 0
        read(address + self._at, piece)

    def check(self, configuration: Mapping[str, Any]) -> str:
        """Return what is wrong with a configuration's results, or ""."""
        return self._wrong(self._build(dict(configuration))[0])

    def static(self, configuration: Mapping[str, Any]) -> tuple[int, int]:
        """Return (spills, instructions) of the code, for a target that need not run here."""
        functions = self._functions(dict(configuration))
        found = tvm_llvm.inspect(functions, self.target)
        return found.spills, found.instructions

    def _wrong(self, call: Callable[..., Any]) -> str:
        check = self.tuning.check
        assert check is not None
        for seed in SEEDS:
            if problem := check(self.spec, self.sizes, self.target, call, seed):
                return problem
        return ""

    def _measure(self, calls: list[Callable[..., Any]], passes: int, end: float = math.inf) -> Measured:
        work = self._work()
        runs = [lambda i, call=call: work.run(call, i) for call in calls]
        # Nobody on this machine builds or measures meanwhile, as far as they share this lock.
        with locked(cache_root() / "tuning" / "measuring.lock"):
            left = max(0.0, end - time.monotonic())
            return measure(runs, passes, probe=self._probe, seconds=left)

    def _work(self) -> Any:
        if self._workload is None:
            least = max(_LEAST_BYTES, EVICTING * self.target.l3)
            assert self.tuning.workload is not None
            self._workload = self.tuning.workload(self.spec, self.sizes, self.target, least)
        return self._workload

    def _probe(self) -> float:
        """Return the read bandwidth over the next parts of the inputs, in bytes a second."""
        from . import probes

        address, nbytes = self._work().area
        piece = min(nbytes, _PROBE_BYTES)
        found = []
        for _ in range(3):  # pieces that were not read lately: caches have no part in it
            self._at = self._at + piece if self._at + 2 * piece <= nbytes else 0
            found.append(probes.read_area(address + self._at, piece))
        return statistics.median(found)

    def _functions(self, configuration: dict[str, Any]) -> list[Any]:
        """Return the PrimFuncs that this problem's phase calls."""
        assert self.form.lower is not None
        wanted = self.tuning.functions(self.spec, self.phase)
        functions = self.form.lower(self.spec, configuration, self.target)
        return [f for f in functions if str(f.attrs["global_symbol"]) in wanted]

    def _build(self, configuration: dict[str, Any]) -> tuple[Callable[..., Any], int]:
        """Return (the callable, spills) of a configuration; of its library only what this phase calls."""
        key = json.dumps(configuration, sort_keys=True)
        if key not in self._calls:
            if self.form.lower is None:
                library, spills = None, 0
            elif key in self.libraries:
                data, spills = self.libraries.pop(key)
                library = _load(data)
            else:
                with locked(cache_root() / "tuning" / "measuring.lock", shared=True):
                    library, spills = self._compile(configuration)
            bound = self.form.bind(self.spec, configuration, self.target, library)
            self._calls[key] = (bound, spills)  # pyright: ignore[reportArgumentType]
        return self._calls[key]  # pyright: ignore[reportReturnType]

    def library(self, configuration: dict[str, Any]) -> tuple[bytes, int]:
        """Return (bytes of the linked library, spills) for this target, which need not run here.

        Of a form that builds nothing the bytes are empty.
        """
        if self.form.lower is None:
            return b"", 0
        executable = tvm_llvm.compile_module(self._functions(configuration), self.target)
        with tempfile.TemporaryDirectory(prefix="edgeformer-trial-") as name:
            tvm_llvm.link(executable, self.target, Path(name))
            data = (Path(name) / tvm_llvm.LIBRARY_NAME).read_bytes()
        return data, tvm_llvm.inspect_executable(executable).spills

    def _compile(self, configuration: dict[str, Any]) -> tuple[Any, int]:
        self.target.require_runnable()
        data, spills = self.library(configuration)
        return _load(data), spills


def _load(data: bytes) -> _Part:
    """Load a library from its bytes."""
    with tempfile.TemporaryDirectory(prefix="edgeformer-trial-") as name:  # what is loaded stays mapped
        path = Path(name) / tvm_llvm.LIBRARY_NAME
        path.write_bytes(data)
        library = tvm_llvm.load(path)
    threads.attach(library)
    return _Part(library)


class _Part:
    """A library with some of its functions; asking for another gives one that says so when it is called."""

    def __init__(self, library: tvm_llvm.LoadedLibrary) -> None:
        self._library = library
        self.handle = library.handle

    def function(self, name: str) -> Callable[..., Any]:
        try:
            return self._library.function(name)
        except (AttributeError, RuntimeError):

            def missing(*ignored: Any) -> None:
                raise BuildError(f"{name} is not part of this trial")

            return missing
