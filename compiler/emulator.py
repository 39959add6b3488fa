"""Kernels for another CPU, run under qemu-user on this process's memory: for checking, never for timing.

`EmulatedLibrary` stands where a LoadedLibrary stands: its functions take the same addresses, and qemu's
process brings their pages over when it touches them (see emulator.c). Speed says nothing about the device.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import functools
import hashlib
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from .backends import tvm_llvm
from .errors import BuildError, TargetError
from .target import Target

PAGE = 65536
_SYSROOT = Path("/usr/aarch64-linux-gnu")


def missing(arch: str = "aarch64") -> str | None:
    """Return what has to be installed before code for `arch` can be emulated here, or None."""
    if arch != "aarch64":
        return f"there is no emulation of {arch}"
    if _qemu() is None:
        return "qemu-aarch64 is missing: apt-get install qemu-user-static"
    if shutil.which("aarch64-linux-gnu-gcc") is None:
        return (
            "the C library of aarch64 is missing: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
        )
    return None


def cpu_for(target: Target) -> str:
    """Return qemu's name of a CPU that has the target's features and few more."""
    if "i8mm" in target.features or "sve" in target.features:
        return "max"
    return "neoverse-n1" if "asimddp" in target.features else "cortex-a72"


class EmulatedLibrary:
    """A cross-built kernels.so under qemu-user; `threads` is how many a parallel launch gets.

    Raises TargetError where qemu or the other CPU's C library is missing, BuildError when the library
    cannot be loaded or a function ends in an error (an access outside of this process's memory is one).
    """

    def __init__(self, path: Path, cpu: str = "max", threads: int = 1) -> None:
        if reason := missing():
            raise TargetError(reason)
        self.path, self.cpu, self.threads = path, cpu, threads
        self.handle: Any = self  # a library without one runs in TVM's own pool
        self._process: subprocess.Popen[bytes] | None = None

    def function(self, name: str) -> Callable[..., Any]:
        """Return the function `name`; it takes ints and floats, addresses of this process included."""
        return functools.partial(self._call, name)

    def close(self) -> None:
        """End qemu's process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __del__(self) -> None:
        self.close()

    def _call(self, name: str, *arguments: int | float) -> None:
        for attempt in range(4):
            answer = self._attempt(name, arguments)
            if answer is None:
                return
            self.close()
            if not answer.startswith("occupied") or attempt == 3:  # its own memory is elsewhere next time
                raise BuildError(f"{name} under qemu ({self.cpu}): {answer}")

    def _attempt(self, name: str, arguments: tuple[int | float, ...]) -> str | None:
        """Run one call; return what went wrong, or None."""
        process = self._start()
        assert process.stdin is not None and process.stdout is not None
        encoded = name.encode()
        parts = [b"c", struct.pack("<I", len(encoded)), encoded]
        parts.append(struct.pack("<II", self.threads, len(arguments)))
        for value in arguments:
            kind = "<Id" if isinstance(value, float) else "<Iq"
            parts.append(struct.pack(kind, int(isinstance(value, float)), value))
        sent: dict[int, bytes] = {}
        pages: list[tuple[int, bytes]] = []
        memory = _Memory()
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended: its last words say why
                process.stdin.write(b"".join(parts))
                process.stdin.flush()
            while True:
                what = process.stdout.read(1)
                if what == b"p":
                    (address,) = struct.unpack("<Q", process.stdout.read(8))
                    data = memory.read(address)
                    if data is not None:
                        sent[address] = data
                    process.stdin.write(b"\0" if data is None else b"\1" + data)
                    process.stdin.flush()
                elif what == b"w":
                    (address,) = struct.unpack("<Q", process.stdout.read(8))
                    pages.append((address, process.stdout.read(PAGE)))
                elif what == b"r":
                    (status,) = struct.unpack("<i", process.stdout.read(4))
                    for address, data in pages:
                        memory.write(address, sent[address], data)
                    return f"status {status}" if status else None
                elif what == b"e":
                    (length,) = struct.unpack("<I", process.stdout.read(4))
                    return process.stdout.read(length).decode(errors="replace")
                else:
                    return f"it ended with {process.wait()} (an instruction that {self.cpu} lacks?)"
        except OSError as error:
            return f"{error}"

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            command = [_qemu() or "", "-cpu", self.cpu, "-L", str(_SYSROOT), str(_runner()), str(self.path)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        return self._process


class _Memory:
    """This process's mapped memory, page by page; bytes outside of it read as 0xff."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._writable: list[bool] = []
        for line in Path("/proc/self/maps").read_text().splitlines():
            words = line.split()
            first, last = (int(word, 16) for word in words[0].split("-"))
            if words[1].startswith("r") and "[v" not in line:
                self._starts.append(first)
                self._ends.append(last)
                self._writable.append("w" in words[1])

    def read(self, page: int) -> bytes | None:
        """Return a page's bytes, or None where nothing is mapped."""
        pieces = self._pieces(page)
        if not pieces:
            return None
        data = bytearray(b"\xff" * PAGE)
        for first, last, _ in pieces:
            data[first - page : last - page] = ctypes.string_at(first, last - first)
        return bytes(data)

    def write(self, page: int, before: bytes, after: bytes) -> None:
        """Store the bytes that changed: the others of a page may have been written here meanwhile."""
        old, new = np.frombuffer(before, np.uint8), np.frombuffer(after, np.uint8)
        changed = old != new
        for first, last, writable in self._pieces(page):
            part = slice(first - page, last - page)
            if writable and changed[part].any():
                place = np.ctypeslib.as_array((ctypes.c_uint8 * (last - first)).from_address(first))
                place[changed[part]] = new[part][changed[part]]

    def _pieces(self, page: int) -> list[tuple[int, int, bool]]:
        found = []
        for i in range(max(0, bisect.bisect_right(self._starts, page) - 1), len(self._starts)):
            first, last = max(page, self._starts[i]), min(page + PAGE, self._ends[i])
            if self._starts[i] >= page + PAGE:
                break
            if first < last:
                found.append((first, last, self._writable[i]))
        return found


def _qemu() -> str | None:
    return shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


@functools.cache
def _runner() -> Path:
    """Return the program that runs under qemu, built once a process."""
    source = (resources.files(__package__ or "") / "emulator.c").read_text()
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    folder = Path(tempfile.mkdtemp(prefix="edgeformer-emulator-"))
    import atexit

    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    text, program = folder / "emulator.c", folder / f"emulator-{digest}"
    text.write_text(source)
    tvm_llvm.run_tool(
        ["aarch64-linux-gnu-gcc", "-O2", "-rdynamic", "-o", str(program), str(text), "-ldl", "-lpthread"]
    )
    return program
