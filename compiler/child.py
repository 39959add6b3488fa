"""A child process that answers requests: what crashes, hangs or eats memory in it costs one answer."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, cast

# The child puts the first candidate for an out-of-memory kill here.
_OOM_SCORE = "/proc/self/oom_score_adj"


class ChildError(Exception):
    """The child gave no answer: `kind` is "crash", "hang", "memory" or "error"; the text says more."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Child:
    """Runs `module.function(connection)` in a fresh interpreter when the first request comes.

    A request is any value that pickles; so is the answer. After a crash or a time-out the next request
    starts a new child. Use it as a context manager: on leaving, the child ends.
    """

    def __init__(
        self, entry: str, *, memory_bytes: int = 0, environment: dict[str, str] | None = None
    ) -> None:
        self.entry, self.memory_bytes = entry, memory_bytes
        self.environment = environment or {}
        self.starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def ask(self, request: Any, timeout: float) -> Any:
        """Return the child's answer within `timeout` seconds. Raises ChildError."""
        if self._process is None:
            self._start()
        connection, process = self._connection, self._process
        assert connection is not None and process is not None
        try:
            connection.send(request)
            if not connection.poll(timeout):
                self.close()
                raise ChildError("hang", f"no answer within {timeout:.0f} s")
            kind, value = connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            code = process.returncode
            self.close()
            kind = "memory" if code == -signal.SIGKILL else "crash"
            name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
            raise ChildError(kind, f"the process ended: {name}") from error
        if kind == "answer":
            return value
        raise ChildError(kind, value)

    def close(self) -> None:
        """End the child."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = self._connection = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *ignored: object) -> None:
        self.close()

    def _start(self) -> None:
        import multiprocessing

        ours, theirs = multiprocessing.Pipe()
        module, _, function = self.entry.partition(":")
        code = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            f"from {__name__} import serve\n"
            f"serve({theirs.fileno()}, {module!r}, {function!r}, {self.memory_bytes})"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if "EDGEFORMER_CHILD_STDERR" not in self.environment else None,
            env=os.environ | self.environment,
            process_group=0,  # Ctrl-C reaches the parent alone, which ends the child
        )
        theirs.close()
        self._connection = cast(Connection, ours)
        self.starts += 1


def serve(descriptor: int, module: str, function: str, memory_bytes: int) -> None:
    """Answer requests until the parent is gone (the child's side)."""
    import importlib

    end_with_parent()
    connection = Connection(descriptor)
    answer: Callable[[Any], Any] = getattr(importlib.import_module(module), function)
    limited = False
    while True:
        try:
            request = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        if memory_bytes and not limited:
            _limit_memory(memory_bytes)
            limited = True
        try:
            found = ("answer", answer(request))
        except MemoryError as error:
            found = ("memory", str(error) or "out of memory")
        except RuntimeError as error:  # torch's allocator says so in words
            text = f"{type(error).__name__}: {error}"
            found = ("memory" if "allocate memory" in text else "error", text)
        except Exception as error:  # noqa: BLE001  the parent decides what it means
            found = ("error", f"{type(error).__name__}: {error}")
        connection.send(found)


def _limit_memory(more: int) -> None:
    """Allow `more` bytes of address space above what is mapped now."""
    import resource

    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (mapped + more, hard))


def end_with_parent() -> None:
    """Ask the system to end this process when its parent ends, and to take it first when memory runs out."""
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    with contextlib.suppress(OSError), open(_OOM_SCORE, "w") as file:
        file.write("1000")
