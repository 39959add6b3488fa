"""embedding: rows of a float or quantised table in the packed layout of the matmul."""

from __future__ import annotations

from ...compiler.operator import Operator, reference_form
from . import reference, tvm_cpu, tvm_opencl
from .spec import EmbeddingSpec

OPERATOR = Operator(
    "embedding",
    EmbeddingSpec,
    reference.embedding,
    (tvm_cpu.FORM, tvm_opencl.FORM, reference_form(reference.embedding)),
)
