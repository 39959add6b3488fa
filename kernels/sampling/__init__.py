"""sampling: greedy, temperature, top-k, top-p, min-p and repetition penalty; seeded, the same everywhere."""

from __future__ import annotations

from ...compiler.operator import Operator, reference_form
from . import reference, tvm_cpu, tvm_opencl
from .spec import SamplingSpec

OPERATOR = Operator(
    "sampling",
    SamplingSpec,
    reference.sample,
    (tvm_cpu.FORM, tvm_opencl.FORM, reference_form(reference.sample)),
)
