"""Tuning on other devices: kernels are built here, checked and timed there, through TVM's RPC."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import pickle
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from ..compiler.child import Child, ChildError
from ..compiler.errors import BuildError, UnsupportedError
from ..compiler.journal import Trial
from ..compiler.measure import Measured, Sample
from ..compiler.target import Target, available_cores
from ..compiler.tuner import OutOfTime, Problem
from .device import ANSWER, DESCRIBE, target_of, unreachable
from .trial import ENDED_WITHIN, Request

_TRIAL_SECONDS, _PREPARE_SECONDS = 90.0, 240.0
_GRACE = 10.0  # seconds by which an answer may be late before its device counts as lost
_CONNECT_SECONDS, _RELEASE_SECONDS = 20.0, 5.0
_MOST_LOST = 3  # devices that a configuration may lose before it is taken for the reason


class DeviceLost(Exception):
    """A device gave no answer: its connection broke, or it is silent."""


class NoDevice(OutOfTime):
    """No device can be reached (any more)."""


def parse_address(text: str) -> tuple[str, int]:
    """Return (host, port) of "HOST:PORT". Raises UnsupportedError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UnsupportedError(f"{text!r} is no address; use HOST:PORT")
    return host, int(port)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a device is: its own address, or a tracker's (`shared`), and the key that it answers to."""

    host: str
    port: int
    key: str = ""
    shared: bool = False

    def connect(self) -> Any:
        """Return an RPC session."""
        from tvm import rpc

        if problem := unreachable(self.host, self.port):
            raise OSError(problem)
        if self.shared:
            return rpc.connect_tracker(self.host, self.port).request(self.key, max_retry=1)
        return rpc.connect(self.host, self.port, self.key)


def places(rpc: Sequence[str], tracker: str, key: str) -> list[Place]:
    """Return a place for each device: the addresses given, or what a tracker has of this key.

    Raises UnsupportedError for a bad address, NoDevice where the tracker has none.
    """
    if not tracker:
        return [Place(*parse_address(text), key) for text in rpc]
    host, port = parse_address(tracker)

    if problem := unreachable(host, port):
        raise NoDevice(f"the tracker {tracker} does not answer: {problem}")

    def count() -> int:
        from tvm import rpc as tvm_rpc

        servers = tvm_rpc.connect_tracker(host, port).summary()["server_info"]
        return sum(server["key"] == f"server:{key}" for server in servers)

    try:
        number = _within(count, _CONNECT_SECONDS)
    except DeviceLost as error:
        raise NoDevice(f"the tracker {tracker} does not answer: {error}") from None
    if not number:
        raise NoDevice(f"the tracker {tracker} has no device of the key {key!r}")
    return [Place(host, port, key, shared=True)] * number


class _Device:
    """One session with a device.

    Its functions are kept as long: TVM asks the device to free one, and holds the interpreter's lock until it
    answers. A silent device's are kept by the thread that waits for it.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._answer, self._describe = _within(self._connect, _CONNECT_SECONDS)
        self.known: set[str] = set()  # problems that it has prepared

    def _connect(self) -> tuple[Any, Any]:
        session = self.place.connect()
        return session.get_function(ANSWER), session.get_function(DESCRIBE)

    def ask(self, request: Request, seconds: float) -> Any:
        """Return the answer of the device's child. Raises ChildError, DeviceLost."""
        text = pickle.dumps((request, seconds))
        kind, value = read_answer(bytes(_within(lambda: self._answer(text), seconds + _GRACE)))
        if kind != "answer":
            raise ChildError(kind, value)
        return value

    def describe(self) -> Target:
        """Return its target."""
        text = str(_within(lambda: self._describe(), _CONNECT_SECONDS))
        try:
            return target_of(text)
        except (ValueError, TypeError, KeyError) as error:
            raise DeviceLost(f"what it says of itself cannot be read: {error}") from error

    def release(self) -> None:
        """See that it answers, or that a thread waits for it, before it is let go of."""
        with contextlib.suppress(DeviceLost):
            _within(lambda: self._describe(), _RELEASE_SECONDS)


class _Answers(pickle.Unpickler):
    """Reads results alone: a device runs what it is sent, but sends nothing that runs here."""

    _known: ClassVar = {(kind.__module__, kind.__qualname__): kind for kind in (Trial, Measured, Sample)}

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the results' classes."""
        found = self._known.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it sent a {module}.{name}, which is no result")
        return found


def read_answer(data: bytes) -> tuple[str, Any]:
    """Return (kind, value) of a device's answer. Raises DeviceLost for anything else."""
    try:
        kind, value = _Answers(io.BytesIO(data)).load()
    except Exception as error:  # whatever pickle makes of damaged bytes
        raise DeviceLost(f"its answer cannot be read: {error}") from error
    if not isinstance(kind, str):
        raise DeviceLost(f"its answer cannot be read: {kind!r}")
    return kind, value


def _within(call: Callable[[], Any], seconds: float) -> Any:
    """Return what `call` returns; DeviceLost when it fails or takes longer (its thread is left alone)."""
    answers: queue.Queue[tuple[bool, Any]] = queue.Queue()

    def run() -> None:
        try:
            answers.put((True, call()))
        except Exception as error:  # noqa: BLE001  whatever it is, the device did not answer
            answers.put((False, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        good, value = answers.get(timeout=seconds)
    except queue.Empty:
        raise DeviceLost(f"no answer within {seconds:.0f} s") from None
    if not good:
        said = str(value).strip().splitlines() or [type(value).__name__]
        raise DeviceLost(said[-1]) from value
    return value


class RemoteEvaluator:
    """Trials on devices (see compiler.tuner.Evaluator), as many at once as there are devices.

    A device that is lost costs its running trial, which another one does again. Raises NoDevice when none
    is left.
    """

    def __init__(
        self,
        where: Sequence[Place],
        trial_seconds: float = _TRIAL_SECONDS,
        prepare_seconds: float = _PREPARE_SECONDS,
    ) -> None:
        if not where:
            raise UnsupportedError("there is no device to tune on")
        self.width = len(where)
        self._waiting = list(where)  # places without a session
        self._idle: list[_Device] = []
        self._taken = 0
        self._why = ""  # the last device was lost
        self._changed = threading.Condition()
        self._trial_seconds, self._prepare_seconds = trial_seconds, prepare_seconds
        self._builders: queue.Queue[Child] = queue.Queue()
        for _ in range(min(self.width, available_cores())):
            self._builders.put(Child("edgeformer.runtime.trial:answer"))
        self._libraries: dict[str, tuple[bytes, int]] = {}

    def target(self) -> Target:
        """Return the target that the first device describes. Raises NoDevice."""
        device = self._take()
        try:
            found = device.describe()
        except DeviceLost as error:
            self._drop()
            raise NoDevice(f"the device does not say what it is: {error}") from None
        self._give(device)
        return found

    def trial(self, problem: Problem, configuration: Mapping[str, Any], seconds: float = math.inf) -> Trial:
        """Build here, check and time there; what goes wrong is the Trial's status."""
        given = dict(configuration)
        try:
            return self._ask(problem, "trial", (given,), 0, seconds, (problem.space.default, given))
        except BuildError as error:
            return Trial(given, "build", note=str(error))
        except ChildError as error:
            return Trial(given, error.kind, note=str(error))

    def compare(
        self,
        problem: Problem,
        configurations: Sequence[Mapping[str, Any]],
        passes: int,
        seconds: float = math.inf,
    ) -> Measured:
        """Time configurations in turn, all on one device. Raises BuildError."""
        try:
            return self._ask(problem, "compare", tuple(configurations), passes, seconds, configurations)
        except ChildError as error:
            raise BuildError(f"{problem.title}: {error}") from error

    def close(self) -> None:
        """End the builders, and let go of the devices."""
        while not self._builders.empty():
            self._builders.get().close()
        while self._idle:
            self._idle.pop().release()

    def __enter__(self) -> RemoteEvaluator:
        return self

    def __exit__(self, *ignored: object) -> None:
        self.close()

    def _ask(
        self,
        problem: Problem,
        do: str,
        configurations: tuple[Mapping[str, Any], ...],
        passes: int,
        seconds: float,
        needed: Sequence[Mapping[str, Any]],
    ) -> Any:
        request = dataclasses.replace(
            problem.request, do=do, configurations=configurations, seconds=ENDED_WITHIN * seconds
        )
        if passes:
            request = dataclasses.replace(request, passes=passes)
        libraries = tuple(self._library(request, dict(c)) for c in needed)
        request = dataclasses.replace(request, libraries=tuple(entry for entry in libraries if entry))
        lost = ""
        for _ in range(_MOST_LOST):
            device = self._take()
            timeout = len(configurations) * self._trial_seconds
            timeout += 0.0 if request.problem in device.known else self._prepare_seconds
            try:
                found = device.ask(request, min(timeout, seconds))
            except DeviceLost as error:
                lost = self._why = str(error)
                self._drop()
                continue
            except ChildError as error:
                self._give(device)
                if error.kind == "hang" and seconds < timeout:
                    raise OutOfTime(f"{problem.title}: the time is over") from error
                raise
            device.known.add(request.problem)
            self._give(device)
            return found
        raise ChildError("crash", f"{_MOST_LOST} devices were lost during this: {lost}")

    def _library(self, request: Request, configuration: dict[str, Any]) -> tuple[str, bytes, int] | None:
        """Return (configuration, the library's bytes, its spills), built here for the device's target."""
        text = json.dumps(configuration, sort_keys=True)
        key = f"{request.problem} {text}"
        if key not in self._libraries:
            builder = self._builders.get()
            try:
                build = dataclasses.replace(request, do="build", configurations=(configuration,))
                self._libraries[key] = builder.ask(build, self._trial_seconds)
            finally:
                self._builders.put(builder)
        library, spills = self._libraries[key]
        return (text, library, spills) if library else None

    def _take(self) -> _Device:
        """Return a session that nobody uses, or a new one; waits while others use all that there are."""
        while True:
            with self._changed:
                while not self._idle and not self._waiting and self._taken:
                    self._changed.wait()
                if self._idle:
                    self._taken += 1
                    return self._idle.pop()
                if not self._waiting:
                    why = f" ({self._why})" if self._why else ""
                    raise NoDevice(f"every device is lost{why}; the trials so far are kept")
                place = self._waiting.pop()
                self._taken += 1
            try:
                return _Device(place)
            except DeviceLost as error:
                self._why = f"{place.host}:{place.port}: {error}"
                self._drop()

    def _give(self, device: _Device) -> None:
        with self._changed:
            self._idle.append(device)
            self._taken -= 1
            self._changed.notify()

    def _drop(self) -> None:
        """Count a device as lost; its place is not tried again."""
        with self._changed, contextlib.suppress(ValueError):
            self._taken -= 1
            self._changed.notify_all()
