"""Probes of a CPU's limits: a read-only stream, and dot products from registers and L1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...compiler.operator import Form, accept_all, single_configuration
from ...compiler.target import Target


@dataclass(frozen=True)
class ProbeSpec:
    """The probes have no shape: sizes and repetitions are run-time arguments."""

    def key(self) -> str:
        """One line that names the problem."""
        return "read and dot"


def _lower(spec: ProbeSpec, configuration: Any, target: Target) -> list[Any]:
    from .tvm_cpu import lower

    return lower(target)


def _bind(spec: ProbeSpec, configuration: Any, target: Target, library: Any) -> Any:
    return library


TVM_CPU = Form(
    name="tvm_cpu",
    backend="tvm_llvm",
    decide=accept_all,
    space=single_configuration,
    bind=_bind,
    lower=_lower,
    sources=("kernels/probe", "kernels/shared", "compiler/backends/tvm_llvm.py"),
)
