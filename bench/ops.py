"""Times single kernels on shapes of real models, beside their limits and beside PyTorch, interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..compiler.errors import EdgeFormerError
from ..compiler.target import Target, available_cores, detect
from .check import HIGHEST_FRACTION, DeviceCheck, fixed_probe, sample_warnings
from .device import versions
from .fleet import OURS
from .journal import Journal
from .op_cases import BUILDERS, Call, Case, cases, shapes
from .paired import Pair
from .probes import Limits, measure_limits
from .provenance import commit, fingerprint, new_run_id, now, provenance
from .rows import ratio_of_pairs

SAMPLE_SECONDS = 2e-3  # a sample is at least so long: many calls of a short kernel
CASE_SECONDS = 1.5  # of a case, about
ALL_ROWS = (1, 2, 4, 8, 16, 32, 128, 512, 2048, 4096)


@dataclass(frozen=True)
class OpsOptions:
    """What to measure. `forms`: "" is what dispatch chooses; others are asked for by name.

    The defaults are a suite of minutes; `everything` has all models, 1 to 4,096 rows and contexts to 32k.
    """

    operators: tuple[str, ...] = tuple(BUILDERS)
    models: tuple[str, ...] = ("smollm2-135m", "llama-3.2-1b", "deepseek-v2-lite")
    rows: tuple[int, ...] = (1, 8, 512)
    contexts: tuple[int, ...] = (512, 4096)
    formats: tuple[str, ...] = ("int4",)
    forms: tuple[str, ...] = ("",)
    threads: int | None = None
    repeats: int = 7
    target: str = "auto"
    strict: bool = False
    resume: bool = False

    @classmethod
    def everything(cls, **options: Any) -> OpsOptions:
        """Return all shapes, where `options` do not choose."""
        contexts = (512, 4096, 32768)
        return cls(**{"models": tuple(shapes()), "rows": ALL_ROWS, "contexts": contexts, **options})

    def identity(self) -> dict[str, Any]:
        """Return what must be equal for a run to be resumed."""
        return {k: v for k, v in asdict(self).items() if k not in ("strict", "resume")}


def bench_ops(options: OpsOptions, progress: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """Return one row a case and engine. A target that this host cannot run has no speeds: see `compiled`.

    What has been measured is kept at once; after a kill, `options.resume` goes on with it.
    """
    target = Target.parse(options.target)
    threads = options.threads or available_cores()
    chosen = [
        (form, case)
        for form in options.forms
        for case in cases(
            options.operators, options.models, options.rows, options.contexts, options.formats, form or None,
            detect().l3,
        )
    ]  # fmt: skip
    what = {"ops": options.identity(), "commit": commit(), "device": fingerprint(), "versions": versions()}
    journal = Journal(what, options.resume)
    run = journal.get("run") or journal.keep("run", {"run_id": new_run_id(), "time": now()})
    shared = provenance(run["run_id"], threads, run["time"]) | {"kind": "op", "size": 0, "options": {}}
    if target.missing_on(detect()):
        journal.done()
        return [shared | compiled(case, target) for _, case in chosen]
    limits, check = _measure_all(chosen, options, target, threads, journal, progress)
    rows = [row for form, case in chosen for row in journal[_unit(form, case)]]
    journal.done()
    return [shared | row | _limits(row, limits) | {"device_check": check.row()} for row in rows]


def _unit(form: str, case: Case) -> str:
    return f"case:{form}:{case.name}"


def _measure_all(
    chosen: list[tuple[str, Case]], options: OpsOptions, target: Target, threads: int, journal: Journal,
    progress: Callable[[str], None],
) -> tuple[Limits, DeviceCheck]:  # fmt: skip
    """Measure what the journal does not hold yet, between probes of the device and of its limits."""
    from ..runtime.dispatch import use_target
    from ..runtime.threads import set_threads
    from .model import MeasurementError

    def refuse(found: list[str]) -> None:
        if found and options.strict:
            raise MeasurementError(f"--strict: {'; '.join(found)}")

    use_target(target)
    set_threads(threads)
    check = DeviceCheck(threads, available_cores(), lambda: fixed_probe(threads))
    refuse(check.before())
    limits = measure_limits(threads)
    if earlier := journal.get("limits"):
        limits = limits.best(Limits(**earlier))
    measured = 0
    try:
        for i, (form, case) in enumerate(chosen):
            if _unit(form, case) in journal:
                continue
            progress(f"{i + 1} of {len(chosen)}: {case.name} {form}")
            journal.keep(_unit(form, case), _measure(case, form, options.repeats))
            measured += 1
            if measured % 25 == 0:
                check.again()
                limits = limits.best(measure_limits(threads, repeats=3))
                journal.keep("limits", asdict(limits))
    finally:
        use_target(None)
    limits = limits.best(measure_limits(threads))
    refuse(check.after())
    return limits, check


def compiled(case: Case, target: Target) -> dict[str, Any]:
    """Return the row of a target that cannot run here: whether it compiles, and no speed."""
    from ..compiler.backends import tvm_llvm
    from ..runtime.registry import operators

    row = _names(case, OURS) | _nothing()
    operator = operators().get(case.operator)
    if operator is None or case.spec is None:
        why = "only quant_matmul and attention are compiled for a target that cannot run here"
        return row | {"status": "not run", "proof": "none", "error": why}
    form, spec = operator.forms[0], case.spec()
    if (declined := form.decide(spec, target)) is not None:
        return row | {"status": "declined", "proof": "none", "error": declined.reason}
    try:
        assert form.lower is not None
        tvm_llvm.compile_module(form.lower(spec, form.space(spec, target)[0], target), target)
    except EdgeFormerError as error:
        return row | {"status": "failed", "proof": "none", "error": str(error)}
    return row | {"status": "compiled, not run here", "proof": "compiled", "error": None}


def _measure(case: Case, form: str, repeats: int) -> list[dict[str, Any]]:
    try:
        problem = case.build()
        error = problem.error()
    except (EdgeFormerError, MemoryError) as problem_found:
        failed = {"status": "failed", "proof": "none", "error": str(problem_found)}
        return [_names(case, OURS, form) | _nothing() | failed]
    seconds = interleave({OURS: problem.ours, **problem.peers}, repeats)
    ours = seconds[OURS]
    pairs = {name: [Pair(*both) for both in zip(ours, s, strict=True)] for name, s in seconds.items()}
    ratios = {name: ratio_of_pairs(found) for name, found in pairs.items() if name != OURS}
    best = min((found["ratio"] for found in ratios.values()), default=None)
    rows = []
    for engine, samples in seconds.items():
        middle = statistics.median(samples)
        speeds = [problem.tokens / s for s in samples]
        row = _names(case, engine, form if engine == OURS else "") | {
            "tokens_per_second": problem.tokens / middle,
            "spread": (max(speeds) - min(speeds)) / 2,
            "samples": speeds,
            "seconds": middle,
            "seconds_spread": (max(samples) - min(samples)) / 2,
            "gigabytes_per_second": problem.bytes / middle / 1e9,
            "teraoperations_per_second": problem.operations / middle / 1e12,
            "operations": problem.operations,
            "bytes_per_step": problem.bytes,
            "cached": problem.cached,
            "peak": problem.limit,
            "error_to_reference": error if engine == OURS else None,
            "ratios": ratios if engine == OURS else {},
            "peer_ratio": best if engine == OURS else None,
            "status": "ok",
            "proof": "run",
            "error": None,
            "warnings": sample_warnings(speeds),
            "energy": None,
        }
        rows.append(row)
    return rows


def interleave(calls: dict[str, Call], repeats: int) -> dict[str, list[float]]:
    """Return seconds a call of each, in turns; the one that begins changes. A sample is many short calls."""
    names, counts = list(calls), {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        once = max(time.perf_counter() - start, 1e-7)
        counts[name] = max(1, int(SAMPLE_SECONDS / once))
        if once * repeats > 2 * CASE_SECONDS:
            repeats = max(3, int(2 * CASE_SECONDS / once))
    found: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        for i in range(len(names)):
            name = names[(i + repeat) % len(names)]
            call, count = calls[name], counts[name]
            call()  # the cache is this engine's again
            start = time.perf_counter()
            for _ in range(count):
                call()
            found[name].append((time.perf_counter() - start) / count)
    return found


def _names(case: Case, engine: str, form: str = "") -> dict[str, Any]:
    return {
        "engine": f"{engine} {form}".strip(), "model": case.model, "test": case.name, "test_kind": "op",
        "operator": case.operator, "tokens": case.tokens, "depth": case.context, "batch": 1,
    }  # fmt: skip


def _nothing() -> dict[str, Any]:
    names = (
        "tokens_per_second",
        "spread",
        "seconds",
        "seconds_spread",
        "limit_fraction",
        "error_to_reference",
    )
    return dict.fromkeys(names) | {"samples": [], "warnings": [], "energy": None}


def _limits(row: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """Return what part of its limit a row reaches: the slower of memory and of the peak that counts."""
    measured = {
        "read_bandwidth": limits.read_bandwidth, "int8_peak": limits.int8_peak,
        "float_peak": limits.float_peak, "matrix_peak": limits.matrix_peak,
        "rounds": limits.rounds, "probes": limits.probes,
    }  # fmt: skip
    if row["seconds"] is None:
        return {"limits": measured}
    peaks = [limits.matrix_peak, limits.int8_peak if row["peak"] == "int8" else limits.float_peak]
    peak = max((p for p in peaks if p), default=None)
    compute = row["operations"] / peak if peak else 0.0
    memory = 0.0 if row["cached"] else row["bytes_per_step"] / limits.read_bandwidth
    least = max(compute, memory)
    why = "its operations over the peak" if compute >= memory else "its bytes over the read bandwidth"
    small = row["cached"] and row["bytes_per_step"] / limits.read_bandwidth > compute
    if not least or small:
        why = "it runs from the cache, whose speed is not probed"
        return {"limits": measured, "limit_fraction": None, "limit": why}
    part = round(least / row["seconds"], 4)
    found = {"limits": measured, "limit_fraction": part, "limit": why}
    if part > HIGHEST_FRACTION:
        text = f"at {part:.0%} of the measured limit: the machine's speed changed during the run"
        found["warnings"] = [*row["warnings"], text]
    return found
