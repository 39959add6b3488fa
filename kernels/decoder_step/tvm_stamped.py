"""The whole step with a time stamp behind every barrier: the same code, for profiles.

The first thread writes (phase, cycle counter) pairs behind the barrier's own memory, so the functions have
the arguments of the plain ones. A stamp costs tens of cycles beside a barrier of hundreds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ...compiler.target import Target
from ..quant_matmul.tvm_cpu import many_rows
from ..shared import tir
from ..shared.isa.table import by_name
from ..shared.tir import T
from . import TVM_CPU
from .spec import DecoderStepSpec
from .tvm_chunk import Chunk
from .tvm_cpu import Step
from .workspace import BARRIER_BYTES

STAMPS = 8000  # at most in one call; further ones are lost
BUFFER_BYTES = BARRIER_BYTES + 8 + 16 * STAMPS

_TEXT = f"""
declare i64 @llvm.readcyclecounter()
define linkonce_odr i32 @ef_stamp(ptr %s, i64 %thread, i64 %id) noinline {{
  %first = icmp eq i64 %thread, 0
  br i1 %first, label %take, label %done
take:
  %n = load i64, ptr %s, align 8
  %room = icmp ult i64 %n, {STAMPS}
  br i1 %room, label %put, label %done
put:
  %twice = shl i64 %n, 1
  %at = add i64 %twice, 1
  %p = getelementptr i64, ptr %s, i64 %at
  store i64 %id, ptr %p, align 8
  %behind = add i64 %twice, 2
  %q = getelementptr i64, ptr %s, i64 %behind
  %c = call i64 @llvm.readcyclecounter()
  store i64 %c, ptr %q, align 8
  %next = add i64 %n, 1
  store i64 %next, ptr %s, align 8
  br label %done
done:
  ret i32 0
}}"""


class _Stamped:
    """Stamps behind every barrier, and where a part begins; `labels` names each stamp's phase."""

    labels: list[str]
    phase = "start"

    def _stamp(self: Any, label: str | None = None) -> None:
        found = self.phase if label is None else label
        self.labels.append(found)
        at = tir.buffer_at(tir.let(self.kernel["barrier"] + T.int64(BARRIER_BYTES)), "int64")
        number = T.int64(len(self.labels) - 1)
        with tir.import_llvm(_TEXT):
            T.evaluate(T.call_extern("int32", "ef_stamp", T.address_of(at[T.int64(0)]), self.thread, number))

    def _barrier(self: Any) -> None:
        super()._barrier()  # pyright: ignore[reportAttributeAccessIssue]
        self._stamp()

    def _embed(self: Any) -> None:
        self._stamp("start")
        self.phase = "embedding"
        super()._embed()  # pyright: ignore[reportAttributeAccessIssue]

    def _layers(self: Any) -> None:
        self._stamp("start")
        super()._layers()  # pyright: ignore[reportAttributeAccessIssue]

    def _context(self: Any, name: str, buffers: dict[str, Any], kind: int = 0) -> Any:
        self.phase = "qkv" if name == "values" else name
        return super()._context(name, buffers, kind)  # pyright: ignore[reportAttributeAccessIssue]

    def _attention(self: Any, at: dict[str, Any]) -> Any:
        self.phase = "attention"
        return super()._attention(at)  # pyright: ignore[reportAttributeAccessIssue]


class StampedStep(_Stamped, Step):
    """A step: "qkv" has its norm, rope and KV append; "gate_up" its norm."""


class StampedChunk(_Stamped, Chunk):
    """A chunk, whose rows are prepared between barriers of their own."""

    def _normed_rows(self, weight: Any, context: Any) -> None:
        product, self.phase = self.phase, f"norm for {self.phase}"
        super()._normed_rows(weight, context)
        self.phase = product

    def _rotate_and_append(self, at: dict[str, Any], row: Any, first: Any, last: Any) -> None:
        self.phase = "rope, KV append"
        super()._rotate_and_append(at, row, first, last)

    def _claimed(self, context: Any) -> None:
        self.phase = self.phase.removeprefix("round for ")
        super()._claimed(context)

    def _own_rows(self, context: Any) -> Any:
        if not self.phase.startswith("norm for "):
            self.phase = f"round for {self.phase}"
        return super()._own_rows(context)


def emitters(
    spec: DecoderStepSpec, configuration: Mapping[str, Any], target: Target
) -> dict[str, StampedStep | StampedChunk]:
    """Return the emitters by function name, with the names of `tvm_cpu.lower`."""
    isa = by_name(str(configuration.get("isa") or target.isa))
    rows = many_rows(spec.matmul("qkv"), configuration)
    found: dict[str, StampedStep | StampedChunk] = {
        "chunk": StampedChunk("chunk", spec, isa, rows, configuration, target.arch)
    }
    if spec.activation != "bfloat16":
        found["step_1"] = StampedStep("step_1", spec, isa, 1, configuration, target.arch)
    for emitter in found.values():
        emitter.labels = []
    return found


def labels(spec: DecoderStepSpec, configuration: Mapping[str, Any], target: Target) -> dict[str, list[str]]:
    """Return the phase that each stamp of each function ends ("start": it begins one)."""
    made = emitters(spec, configuration, target)
    for emitter in made.values():
        emitter.emit()
    return {name: emitter.labels for name, emitter in made.items()}


def _lower(spec: DecoderStepSpec, configuration: Mapping[str, Any], target: Target) -> list[Any]:
    return [emitter.emit() for emitter in emitters(spec, configuration, target).values()]


STAMPED = dataclasses.replace(TVM_CPU, name="tvm_cpu_stamped", lower=_lower)
