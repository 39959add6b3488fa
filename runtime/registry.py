"""The explicit list of operators."""

from __future__ import annotations

import functools

from ..compiler.operator import Operator


@functools.cache
def operators() -> dict[str, Operator]:
    """Return every operator by name."""
    from ..kernels import attention, embedding, norm, quant_matmul, rope, sampling

    modules = (quant_matmul, attention, norm, rope, embedding, sampling)
    return {module.OPERATOR.name: module.OPERATOR for module in modules}
