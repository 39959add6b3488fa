"""norm: RMSNorm and LayerNorm over the last dimension, with and without quantising the output."""

from __future__ import annotations

from typing import Any

from ...compiler.operator import Operator, reference_form
from . import reference, tvm_cpu, tvm_opencl
from .spec import NormSpec


def _reference(spec: NormSpec, *args: Any) -> Any:
    return reference.norm_quantized(spec, *args[:3]) if spec.group_size else reference.norm(spec, *args)


OPERATOR = Operator("norm", NormSpec, _reference, (tvm_cpu.FORM, tvm_opencl.FORM, reference_form(_reference)))
