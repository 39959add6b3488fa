"""Times the Triton kernels on a GPU beside what PyTorch offers, and beside the device's copy and GEMM rates.

Every kernel is compared with fp64 before it is timed, and so is every peer that computes the same. Neither
TVM nor a C compiler is needed. `device="cpu"` runs the same steps at small sizes in Triton's interpreter,
without times.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

from ..compiler.errors import DeviceError, EdgeFormerError, UnsupportedError
from ..compiler.measure import Sample

OURS = "edgeformer"
_COPY_BYTES, _GEMM = 1 << 30, 8192


@dataclasses.dataclass(frozen=True)
class GpuOptions:
    """What to measure: operators (() for all), passes of every call, and when to stop timing (seconds)."""

    device: str = "cuda"
    operators: tuple[str, ...] = ()
    passes: int = 20
    seconds: float = 450.0


def require_device(device: str) -> None:
    """Raise DeviceError when PyTorch sees no such device, UnsupportedError without Triton."""
    import torch

    from ..compiler.backends.triton_gpu import available

    if problem := available():
        raise UnsupportedError(problem)
    module = getattr(torch, device, None)
    if module is None or not module.is_available():
        raise DeviceError(
            f"PyTorch {torch.__version__} sees no {device} device here, so there is nothing to measure; "
            "`make cross` reads the kernels' machine code without one"
        )


def bench_gpu(options: GpuOptions, progress: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """Return one row a case and engine. Raises DeviceError where the device is not there."""
    import torch

    from ..runtime.gpu_cases import Box, cases
    from ..runtime.gpu_cases import operators as known

    dry = options.device == "cpu"
    if unknown := set(options.operators) - known():
        raise UnsupportedError(
            f"unknown operators {', '.join(sorted(unknown))}; on a GPU: {', '.join(sorted(known()))}"
        )
    if not dry:
        require_device(options.device)
    torch.manual_seed(0)
    box = Box(options.device, torch.float16 if dry else torch.bfloat16, small=dry)
    start, shared = time.monotonic(), where(options.device)
    rates = {} if dry else limits(options)
    rows: list[dict[str, Any]] = []
    waiting = cases(box, options.operators)
    while True:
        try:
            case = next(waiting)
        except StopIteration:
            break
        except (EdgeFormerError, RuntimeError) as error:  # memory is out, or a fault took the device along
            failed = {**_blank("inputs of the next problem", "", OURS, ""), "status": "failed"}
            return [*rows, shared | rates | failed | {"error": f"{type(error).__name__}: {str(error)[:300]}"}]
        progress(case.name)
        timed = not dry and time.monotonic() - start < options.seconds
        rows += [shared | rates | row for row in measure(case, options, rates, timed)]
    return rows


def where(device: str) -> dict[str, Any]:
    """Return the device and versions that stand in every row."""
    import torch
    import triton

    name = "Triton's interpreter" if device == "cpu" else getattr(torch, device).get_device_name()
    return {"kind": "gpu_op", "gpu": name, "torch": torch.__version__, "triton": triton.__version__}


def limits(options: GpuOptions) -> dict[str, float]:
    """Return bytes a second of a copy (read and written) and operations a second of a bf16 GEMM, now."""
    import torch

    from ..runtime.gpu_trial import times_of

    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(_GEMM, _GEMM, device=options.device).bfloat16() for _ in range(2))
    found = times_of([lambda: target.copy_(source), lambda: a @ b], options.passes, options.device)
    copy, gemm = (statistics.median(times) for times in found)
    return {"copy_bytes_per_second": 2 * _COPY_BYTES / copy, "gemm_flops": 2 * _GEMM**3 / gemm}


def measure(case: Any, options: GpuOptions, rates: dict[str, float], timed: bool) -> list[dict[str, Any]]:
    """Return a case's rows: checked, then timed in turn with its peers; what fails says so."""
    from ..runtime.gpu_trial import times_of

    rows, calls = [], {}
    for engine, call in {OURS: case.run, **case.peers}.items():
        row = _blank(case.name, case.operator, engine, case.mark)
        rows.append(row)
        try:
            found = case.error(call)
        except Exception as error:  # noqa: BLE001  whatever a tool chain raises is this row's answer
            row |= {"status": "failed", "error": f"{type(error).__name__}: {str(error)[:300]}"}
            continue
        row["error_to_reference"] = found
        if engine == OURS and not found <= case.tolerance:
            row |= {"status": "wrong", "error": f"relative error {found:.1e} > {case.tolerance:.0e}"}
        elif engine != OURS and not found <= case.tolerance and "without" not in engine:
            row |= {"status": "wrong", "error": f"relative error {found:.1e}: not the same problem"}
        else:
            calls[engine] = call
    if not timed or OURS not in calls:
        return rows
    try:
        times = dict(zip(calls, times_of(list(calls.values()), options.passes, options.device)))
    except RuntimeError as error:  # a kernel that faults while it is timed takes the device with it
        return [{**row, "status": "failed", "error": f"while timed: {str(error)[:300]}"} for row in rows]
    ours = statistics.median(times[OURS])
    for row in rows:
        if row["engine"] in times:
            row |= speeds(case, times[row["engine"]], ours, rates)
            if row["engine"] != OURS:  # a peer may have to read more, such as weights in 16 bits
                row |= {"terabytes_per_second": None, "of_copy": None}
    return rows


def _blank(test: str, operator: str, engine: str, mark: str) -> dict[str, Any]:
    names = ["error_to_reference", "seconds", "seconds_spread", "terabytes_per_second", "teraflops"]
    names += ["of_copy", "of_gemm", "speedup", "error"]
    about = {"test": test, "operator": operator, "engine": engine, "mark": mark, "status": "right"}
    return about | dict.fromkeys(names)


def speeds(case: Any, times: list[float], ours: float, rates: dict[str, float]) -> dict[str, Any]:
    """Return the figures of one engine's times; `speedup` is how many times longer than ours it takes."""
    sample = Sample.of(times)
    found: dict[str, Any] = {
        "status": "timed", "seconds": sample.seconds, "seconds_spread": sample.spread, "samples": times,
        "speedup": sample.seconds / ours,
    }  # fmt: skip
    if case.nbytes:
        found["terabytes_per_second"] = case.nbytes / sample.seconds / 1e12
        found["of_copy"] = case.nbytes / sample.seconds / rates["copy_bytes_per_second"]
    if case.operations:
        found["teraflops"] = case.operations / sample.seconds / 1e12
        found["of_gemm"] = case.operations / sample.seconds / rates["gemm_flops"]
    return found


_HEAD = ["problem", "by", "time, µs", "TB/s", "TFLOP/s", "of copy", "of GEMM", "error", "time of ours"]


def render_gpu(rows: list[dict[str, Any]], form: str) -> str:
    """Return rows as text: "md" a table with notes, other forms those of any row."""
    from .table import markdown_table, render

    if form != "md":
        return render(rows, form)
    cells = [
        [
            row["test"], row["engine"],
            _time(row),
            _number(row["terabytes_per_second"], ".3f"), _number(row["teraflops"], ".1f"),
            _number(row["of_copy"], ".0%"), _number(row["of_gemm"], ".0%"),
            _number(row["error_to_reference"], ".1e"),
            "" if row["engine"] == OURS else _number(row["speedup"], ".2f"),
        ]
        for row in rows
    ]  # fmt: skip
    parts = [markdown_table(_HEAD, cells, left=2)]
    if rows and "copy_bytes_per_second" in rows[0]:
        copy, gemm = rows[0]["copy_bytes_per_second"] / 1e12, rows[0]["gemm_flops"] / 1e12
        parts.insert(0, f"{rows[0]['gpu']}: copy {copy:.2f} TB/s, bf16 GEMM {gemm:.0f} TFLOP/s in this run")
    notes = [f"- {row['engine']}, {row['test']}: {row['error']}" for row in rows if row["error"]]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def _time(row: dict[str, Any]) -> str:
    if not row["seconds"]:
        return row["status"]
    return f"{row['seconds'] * 1e6:,.1f} ± {row['seconds_spread'] * 1e6:,.1f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
