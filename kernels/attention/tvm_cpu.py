"""The CPU form: functions decode (few queries, split keys) and prefill (tiles), composed of phases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...compiler.target import Target
from ..shared import tir
from ..shared.claim import reset
from ..shared.isa.table import Isa, by_name
from ..shared.tir import T
from .spec import AttentionSpec
from .tvm_cpu_decode import Decode
from .tvm_cpu_matrix import MatrixPrefill
from .tvm_cpu_prefill import Prefill
from .tvm_problem import Arguments, Problem, argument_types, quotient

_SERIAL_MERGE = 1 << 14  # elements of partial results that one thread merges faster than a launch


def lower(spec: AttentionSpec, configuration: Mapping[str, Any], target: Target) -> list[Any]:
    """Return the PrimFuncs `decode` (not for bf16 math) and `prefill`."""
    isa = by_name(str(configuration.get("isa") or target.isa))
    if spec.math == "bfloat16":
        return [_prefill(spec, isa, int(configuration["block_q"]), int(configuration["block_k"]))]
    return [
        _decode(spec, isa, int(configuration["chunk"]), bool(configuration["prefetch"])),
        _prefill(spec, isa, int(configuration["block_q"]), int(configuration["block_k"])),
    ]


def prefill_emitter(problem: Problem, block_q: int, block_k: int, counter: Any = None) -> Prefill:
    """Return the emitter of prefill for the problem's arithmetic."""
    return (MatrixPrefill if problem.spec.math == "bfloat16" else Prefill)(problem, block_q, block_k, counter)


def _problem(name: str, spec: AttentionSpec, isa: Isa) -> tuple[Any, Problem]:
    types = argument_types(spec)
    kernel = tir.Kernel(name, types)
    return kernel, Problem(spec, isa, Arguments(**{n: kernel[n] for n, _ in types}))


def _decode(spec: AttentionSpec, isa: Isa, max_chunk: int, prefetch: bool) -> Any:
    kernel, problem = _problem("decode", spec, isa)
    decode = Decode(problem, max_chunk, prefetch)
    with tir.parallel(problem.args.threads) as thread:
        decode.phase_partials(thread)
    rows = tir.let(decode.rows())
    small = rows * quotient(problem.args.tk, problem.args.chunk) * spec.v_head_dim <= _SERIAL_MERGE
    with tir.when(small), tir.loop(rows) as row:
        decode.phase_merge(row)
    with tir.when(T.Not(small)), tir.parallel(rows) as row:
        decode.phase_merge(row)
    return kernel.finish()


def _prefill(spec: AttentionSpec, isa: Isa, block_q: int, block_k: int) -> Any:
    kernel, problem = _problem("prefill", spec, isa)
    prefill = prefill_emitter(problem, block_q, block_k)
    reset(prefill.counter())
    with tir.parallel(problem.args.threads) as thread:
        prefill.phase(thread)
    return kernel.finish()
