"""embedding on a CPU through TVM: each id's row is decoded straight from the packed table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...compiler.operator import Configuration, Declined, Form
from ...compiler.target import Target
from ..quant_matmul.packing import PackedWeight
from .space import space
from .spec import EmbeddingSpec, check_ids

PARALLEL_ELEMENTS = 1 << 14  # below it the launch costs more than the second thread saves


def decide(spec: EmbeddingSpec, target: Target) -> Declined | None:
    """Accept the layouts that this form reads."""
    if "tvm_llvm" not in target.backends:
        return Declined(f"target {target.name} has no tvm_llvm back end")
    if not spec.layout.startswith("n32."):
        return Declined(f"layout {spec.layout} is not n32")
    return None


def lower(spec: EmbeddingSpec, configuration: Configuration, target: Target) -> list[Any]:
    """Return the PrimFuncs `embedding` (serial) and `embedding_parallel`."""
    from ..shared import tir
    from .tvm_emit import PackedRow

    functions = []
    for name, ids_loop in (("embedding", tir.loop), ("embedding_parallel", tir.parallel)):
        args = [("ids", "*int64"), ("table", "int64"), ("out", "*" + spec.out_dtype), ("count", "int64")]
        k = tir.Kernel(name, args)
        with ids_loop(k["count"]) as i:
            row = tir.let(tir.load(k["ids"], i))
            PackedRow(spec, k["table"], row, k["out"], tir.let(i * spec.k))
        functions.append(k.finish())
    return functions


def bind(
    spec: EmbeddingSpec, configuration: Configuration, target: Target, library: Any
) -> Callable[..., Any]:
    """Return call(ids int64 [...], weight) -> [..., k]. Raises EdgeFormerError for an id out of range."""
    serial, threaded = library.function("embedding"), library.function("embedding_parallel")
    out_dtype = getattr(torch, spec.out_dtype)

    def call(ids: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        check_ids(ids, weight.n)
        ids = ids.contiguous()
        out = torch.empty((*ids.shape, spec.k), dtype=out_dtype)
        function = threaded if out.numel() >= PARALLEL_ELEMENTS and ids.numel() > 1 else serial
        function(ids.data_ptr(), weight.buffer.data_ptr(), out.data_ptr(), ids.numel())
        return out

    return call


FORM = Form(
    "tvm_cpu",
    "tvm_llvm",
    decide,
    space,
    bind,
    lower,
    (
        "kernels/embedding",
        "kernels/shared",
        "kernels/quant_matmul/packing.py",
        "compiler/backends/tvm_llvm.py",
    ),
)
