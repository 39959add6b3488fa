"""rope: rotary position embedding, half-split or interleaved, partial, in place or to an output."""

from __future__ import annotations

from ...compiler.operator import Operator, reference_form
from . import reference, tvm_cpu, tvm_opencl
from .spec import RopeSpec

OPERATOR = Operator(
    "rope", RopeSpec, reference.rope, (tvm_cpu.FORM, tvm_opencl.FORM, reference_form(reference.rope))
)
