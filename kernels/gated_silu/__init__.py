"""gated_silu: silu(gate) * up. On a CPU it is an epilogue of the matmul; here it stands alone, for GPUs."""

from __future__ import annotations

from ...compiler.operator import Operator, reference_form
from . import tvm_opencl
from .reference import gated_silu
from .spec import GatedSiluSpec

OPERATOR = Operator("gated_silu", GatedSiluSpec, gated_silu, (tvm_opencl.FORM, reference_form(gated_silu)))
