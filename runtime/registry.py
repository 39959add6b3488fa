"""The explicit list of operators."""

from __future__ import annotations

import functools

from ..compiler.operator import Operator


@functools.cache
def operators() -> dict[str, Operator]:
    """Return every operator by name."""
    from ..kernels import (
        attention,
        embedding,
        gated_silu,
        mla,
        norm,
        quant_matmul,
        rope,
        sampling,
        sparse_mlp,
    )
    from ..kernels.attention import append

    modules = (quant_matmul, attention, append, mla, norm, rope, embedding, sampling, sparse_mlp, gated_silu)
    return {module.OPERATOR.name: module.OPERATOR for module in modules}


def tunable() -> dict[str, Operator]:
    """Return every operator that has a form with tuning, by name."""
    return {name: operator for name, operator in operators().items() if any(f.tuning for f in operator.forms)}
