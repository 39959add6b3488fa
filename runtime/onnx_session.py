"""ONNX Runtime: one session of a decoder, its providers, and caches that stay where they are."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..compiler.backends.onnx_graph import require
from ..compiler.errors import FormatError, UnsupportedError

DIRECTML, CPU = "DmlExecutionProvider", "CPUExecutionProvider"
_MEMORY = {DIRECTML: "dml", CPU: "cpu"}


def default_provider() -> str:
    """Return the provider that is taken where none is named; the CPU's where onnxruntime is missing."""
    if sys.platform != "win32" or importlib.util.find_spec("onnxruntime") is None:
        return CPU
    return choose_provider()


def choose_provider(wanted: str | None = None) -> str:
    """Return the execution provider to run on: DirectML on Windows where it is there, else the CPU's.

    Raises UnsupportedError for one that this build of ONNX Runtime lacks.
    """
    found = require("onnxruntime").get_available_providers()
    if wanted is None:
        return DIRECTML if sys.platform == "win32" and DIRECTML in found else CPU
    if wanted not in _MEMORY or wanted not in found:
        known = ", ".join(name for name in _MEMORY if name in found)
        raise UnsupportedError(
            f"this onnxruntime has no provider {wanted!r} that is supported; it has {known}"
        )
    return wanted


@dataclass
class Buffers:
    """Keys and values of one sequence on the provider's device: one memory, bound as past and present.

    ``bindings`` are of the session of short chunks, then of the one of long ones where there is one.
    """

    capacity: int
    nbytes: int
    bindings: list[Any]
    values: list[Any]
    tokens: int = 0


class DecoderSession:
    """A decoder's graph in ONNX Runtime; see ``model/onnx_decoder.py`` for its inputs and outputs.

    ``long`` is a graph with the same weights that is better for long chunks; the CPU provider alone takes
    it, and both graphs work on the same caches.
    """

    def __init__(
        self, path: Path, *, threads: int, provider: str | None = None, long: Path | None = None
    ) -> None:
        self._api, self._path = require("onnxruntime"), path
        self.provider = choose_provider(provider)
        self._sessions = [self._open(path, threads)]
        if long is not None and self.provider == CPU:
            self._sessions.append(self._open(long, threads))
        self._inputs = {value.name: value for value in self._sessions[0].get_inputs()}

    def _open(self, path: Path, threads: int) -> Any:
        options = self._api.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        if self.provider == DIRECTML:
            options.enable_mem_pattern = False  # DirectML's provider asks for it
            options.execution_mode = self._api.ExecutionMode.ORT_SEQUENTIAL
        try:
            return self._api.InferenceSession(
                str(path),
                options,
                providers=[self.provider] if self.provider == CPU else [self.provider, CPU],
            )
        except Exception as error:  # its types share no base
            raise FormatError(f"ONNX Runtime cannot load {path}: {_short(error)}") from error

    @property
    def whole_prompts(self) -> bool:
        """Whether a chunk of several tokens must be the first: DirectML's attention sees no past then."""
        return self.provider == DIRECTML

    def operators(self) -> Counter[str]:
        """How many nodes of each operator the model file has."""
        model = require("onnx").load_model_from_string(self._path.read_bytes())
        return Counter(node.op_type for node in model.graph.node)

    def buffers(self, pairs: Sequence[tuple[str, str]]) -> Buffers:
        """Allocate zeroed caches for (past, present) names and bind each to one memory."""
        memory, bindings = _MEMORY[self.provider], [session.io_binding() for session in self._sessions]
        values, total, capacity = [], 0, 0
        for past, present in pairs:
            info = self._inputs[past]
            shape, dtype = list(info.shape), {"tensor(float16)": np.float16}.get(info.type, np.float32)
            value = self._api.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), memory, 0)
            for binding in bindings:
                binding.bind_ortvalue_input(past, value)
                binding.bind_ortvalue_output(present, value)
            values.append(value)
            total += int(np.prod(shape)) * np.dtype(dtype).itemsize
            capacity = shape[2]
        return Buffers(capacity, total, bindings, values)

    def run(
        self,
        buffers: Buffers,
        arrays: dict[str, np.ndarray],
        output: str,
        shape: Sequence[int],
        long: bool = False,
    ) -> np.ndarray:
        """Run a step on some buffers; return the fp32 output of that shape, fresh memory.

        ``long`` takes the graph for long chunks, where there is one.
        """
        which = -1 if long else 0
        binding = buffers.bindings[which]
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        out = np.empty(shape, np.float32)
        binding.bind_output(output, "cpu", 0, np.float32, list(shape), out.ctypes.data)
        try:
            self._sessions[which].run_with_iobinding(binding)
        except Exception as error:
            raise UnsupportedError(f"ONNX Runtime failed in a step: {_short(error)}") from error
        return out


def _short(error: Exception) -> str:
    """An error's text in one line."""
    return " ".join(str(error).split())[:400]
