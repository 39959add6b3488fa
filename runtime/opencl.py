"""OpenCL devices at run time: one context and in-order queue a device, its tensors, and its marks."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compiler.artifacts import ArtifactKey, cache_root
from ..compiler.backends import opencl_device, tvm_opencl
from ..compiler.errors import CapacityError, DeviceError
from ..compiler.operator import Form, Operator
from ..compiler.target import Target

MARKS = "opencl-devices.json"  # in the cache folder: what was verified, and what came out wrong


@dataclass(frozen=True)
class DeviceTensor:
    """A contiguous tensor in a buffer of the device; `buffer` is a cl.Buffer."""

    session: Session
    buffer: Any
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Wait for what was enqueued and return a copy on the host."""
        out = torch.empty(self.shape, dtype=self.dtype)
        if out.numel():
            self.session.read_into(out, self.buffer)
        return out


class Session:
    """A device in use: context, one in-order queue, and programs that were loaded."""

    def __init__(self, name: str) -> None:
        import pyopencl as cl

        self._cl = cl
        self.name = name
        self.device, self.limits = opencl_device.select(name)
        try:
            self.context = cl.Context([self.device])
            self.queue = cl.CommandQueue(self.context, self.device)
        except cl.Error as error:
            raise DeviceError(f"{self.limits.name} cannot be used: {error}") from error
        self.programs: dict[str, tvm_opencl.Program] = {}
        self.allocated = 0
        self.reads = 0  # transfers to the host, for whoever counts round trips

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> DeviceTensor:
        """Return a tensor whose elements are not set. Raises CapacityError when the device has no room."""
        nbytes = max(16, math.prod(shape) * dtype.itemsize)
        if nbytes > self.limits.allocation_bytes:
            raise CapacityError(
                f"a tensor of {nbytes / 1e6:.0f} MB is more than {self.limits.name} allocates at once "
                f"({self.limits.allocation_bytes / 1e6:.0f} MB); take a smaller context or model"
            )
        try:
            buffer = self._cl.Buffer(self.context, self._cl.mem_flags.READ_WRITE, nbytes)
        except self._cl.Error as error:
            raise CapacityError(f"{self.limits.name} has no {nbytes / 1e6:.0f} MB left: {error}") from error
        self.allocated += nbytes
        return DeviceTensor(self, buffer, tuple(shape), dtype)

    def upload(self, tensor: Tensor) -> DeviceTensor:
        """Return a copy of a host tensor on the device."""
        tensor = tensor.detach().contiguous()
        made = self.empty(*tensor.shape, dtype=tensor.dtype)
        self.write(made, tensor)
        return made

    def write(self, to: DeviceTensor, tensor: Tensor) -> None:
        """Copy a host tensor into one of the device, in the queue's order."""
        data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
        if data.size:
            with self.errors():
                self._cl.enqueue_copy(self.queue, to.buffer, data, is_blocking=True)

    def read_into(self, out: Tensor, buffer: Any) -> None:
        """Copy the start of a buffer into a host tensor and wait."""
        self.reads += 1
        with self.errors():
            self._cl.enqueue_copy(
                self.queue, out.view(-1).view(torch.uint8).numpy(), buffer, is_blocking=True
            )

    def copy(self, to: DeviceTensor, source: DeviceTensor, nbytes: int) -> None:
        """Copy the first bytes of one tensor to another, on the device."""
        with self.errors():
            self._cl.enqueue_copy(self.queue, to.buffer, source.buffer, byte_count=nbytes)

    def finish(self) -> None:
        """Wait for what was enqueued."""
        with self.errors():
            self.queue.finish()

    @contextlib.contextmanager
    def errors(self) -> Any:
        """Turn an error of the driver into a DeviceError."""
        try:
            yield
        except self._cl.Error as error:
            raise DeviceError(
                f"{self.limits.name} is gone or failed: {error}; load the model again, or use --target auto"
            ) from error


@functools.cache
def session(name: str) -> Session:
    """Return this process's session of a device: "opencl" (the first), "opencl:1". Raises DeviceError."""
    return Session(name)


def bind(
    operator: Operator, form: Form, spec: Any, configuration: Mapping[str, Any], target: Target
) -> Callable[..., Any]:
    """Return the callable of an OpenCL form on the target's device; verified there on first use."""
    program = load(operator, form, spec, configuration, target)
    used, verify = session(target.name), form.verify
    if verify is not None:
        _require_right(operator.name, used, program, lambda: verify(spec, configuration, used, program))
    return form.bind(spec, configuration, target, program)


def load(
    operator: Operator, form: Form, spec: Any, configuration: Mapping[str, Any], target: Target
) -> tvm_opencl.Program:
    """Return the program of a form on the target's device; its source is generated if it is not stored."""
    from . import launch

    assert form.lower is not None
    used = session(target.name)
    key = ArtifactKey(
        operator=operator.name,
        form=form.name,
        spec=spec.key(),
        configuration=json.dumps(dict(configuration), sort_keys=True),
        target=f"opencl/{target.isa}",
        versions=tvm_opencl.versions(),
        sources=launch.source_digest(form.sources),
    )
    digest = key.digest()
    program = used.programs.get(digest)
    if program is None:
        folder = launch.store().get(key)
        if folder is None:
            functions = form.lower(spec, configuration, target)
            launch.statistics["built"] += 1
            folder = launch.store().put(key, lambda path: tvm_opencl.build(functions, path))[0]
        launch.statistics["loaded"] += 1
        program = used.programs[digest] = tvm_opencl.Program(folder, used.context, used.queue, used.limits)
    return program


def _require_right(name: str, used: Session, program: tvm_opencl.Program, check: Callable[[], str]) -> None:
    """Run the check unless this source passed it on this device and driver; mark the device by the result."""
    kernel = f"{name} {hashlib.sha256(program.source.encode()).hexdigest()[:16]}"
    found = marks().get(used.limits.key, {}).get(kernel)
    if found == "right":
        return
    if found is None:
        found = check() or "right"
        _mark(used.limits.key, kernel, found)
    if found != "right":
        raise DeviceError(
            f"{used.limits.name} ({used.limits.driver}) computes {name} wrong: {found}. The device is "
            f"marked in {cache_root() / MARKS}; update its driver, and use --target auto until then"
        )


def marks() -> dict[str, dict[str, str]]:
    """Return what is known of devices: device -> kernel -> "right", or what came out wrong."""
    try:
        found = json.loads((cache_root() / MARKS).read_text())
    except (OSError, ValueError):  # none yet, or damaged: everything is verified again
        return {}
    return found if isinstance(found, dict) and all(isinstance(v, dict) for v in found.values()) else {}


def _mark(device: str, kernel: str, result: str) -> None:
    found = marks()
    found.setdefault(device, {})[kernel] = result
    path: Path = cache_root() / MARKS
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=MARKS)
    with os.fdopen(descriptor, "w") as file:
        json.dump(found, file, indent=1)
    os.replace(temporary, path)
