"""Missing kernels of a model are built by several child processes at once, before the model binds them.

Building uses one core for seconds to half a minute a kernel. What a child does not finish is left to the
parent, which builds what is missing when it binds it, and reports what fails.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import threading
from collections.abc import Sequence
from typing import Any

from ..compiler.backends import tvm_llvm
from ..compiler.child import Child, ChildError
from ..compiler.errors import EdgeFormerError
from ..compiler.operator import Form
from ..compiler.target import Target, available_cores, available_memory
from . import launch

WORTH = 14  # missing kernels: below it this process alone is as fast, and needs less memory
_MEMORY_BYTES = 1 << 30  # of a child at its largest
_SECONDS = 600.0  # for one kernel


@dataclasses.dataclass(frozen=True)
class Job:
    """A kernel to build: the operator's name, where a child finds the form, and the problem."""

    operator: str
    module: str  # has the Operator `OPERATOR`, or the form itself as `attribute`
    attribute: str
    form: str
    spec: Any
    target: Target


def prebuild(wanted: Sequence[tuple[str, Form, Any]], target: Target, *, worth: int = WORTH) -> int:
    """Build what is missing of (operator, form, spec) in their default configurations; the largest first.

    Does nothing for fewer than `worth` missing kernels, without a second core or without memory for two
    children. Returns how many were built. Half of the free memory is left alone.
    """
    if tvm_llvm.available() or tvm_llvm.linker(target) is None:
        return 0
    missing = [job_of(*item, target) for item in dict.fromkeys(wanted) if not launch.is_built(*item, target)]
    return build_all(missing, worth=worth)


def build_all(missing: Sequence[Job], *, worth: int = WORTH) -> int:
    """Build the kernels of these jobs, in their order, under the conditions of `prebuild`."""
    workers = min(available_cores(), available_memory() // (2 * _MEMORY_BYTES), len(missing))
    if len(missing) < worth or workers < 2:
        return 0
    jobs, built = iter(missing), [0] * workers
    taking = threading.Lock()

    def work(slot: int) -> None:
        with Child(f"{__name__}:build") as child:
            while True:
                with taking:
                    job = next(jobs, None)
                if job is None:
                    return
                with contextlib.suppress(ChildError):
                    child.ask(job, _SECONDS)
                    built[slot] += 1

    threads = [threading.Thread(target=work, args=(slot,), daemon=True) for slot in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(built)


def job_of(operator: str, form: Form, spec: Any, target: Target) -> Job:
    """Return the job that builds a problem's kernel in its default configuration."""
    module = type(spec).__module__.rpartition(".")[0]  # kernels.<operator>.spec
    attribute = "OPERATOR" if hasattr(importlib.import_module(module), "OPERATOR") else "TVM_CPU"
    return Job(operator, module, attribute, form.name, spec, target)


def build(job: Job) -> bool:
    """Build and store one kernel (the child's side). Raises RuntimeError with the reason."""
    found = getattr(importlib.import_module(job.module), job.attribute)
    form = found if isinstance(found, Form) else found.form(job.form)
    try:
        launch.build_only(job.operator, form, job.spec, job.target)
    except EdgeFormerError as error:
        raise RuntimeError(str(error)) from error
    return True
