"""The tuning problems of three model sizes, default and tuned beside their limits: see docs/tuning.md.

    python -m edgeformer.bench.tuned search --seconds 20   # tunes what has no record yet
    python -m edgeformer.bench.tuned settle                # times the best again, on a quiet machine
    python -m edgeformer.bench.tuned measure -o FILE.json  # default, tuned and limit, in turn
    python -m edgeformer.bench.tuned table FILE.json       # as Markdown

`--wall N` ends a step after N seconds; the same command goes on with what is left, and measures again what
was taken while the machine's speed moved. `--target NAME` compiles for another CPU that this one can run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..compiler.errors import EdgeFormerError
from ..compiler.measure import MOVED
from ..compiler.records import RecordStore, write_text
from ..compiler.target import Target, available_cores
from ..compiler.tuner import Problem

SIZES = {"135M": (576, 1536), "1B": (2048, 8192), "7B": (4096, 11008)}  # hidden, intermediate
ROWS = (1, 8, 512)
HEADS = {"9/3x64": (9, 3, 64), "32/8x128": (32, 8, 128)}
ATTENTION = {"decode": ((1, 512), (1, 8192)), "prefill": ((512, 512), (4096, 4096))}  # queries, keys
GOALS = {1: 0.88, 512: 0.70, "decode": 0.70, "prefill": 0.50}  # of the limit, on AVX-512 VNNI
_MOST_FRACTION = 1.1


def problems(target: Target, threads: int) -> Iterator[tuple[str, Problem]]:
    """Yield (name, problem) of the 26: INT4 products with groups of 32, and attention over a bf16 cache."""
    yield from _products(target, threads)
    yield from _attention(target, threads)


def _products(target: Target, threads: int) -> Iterator[tuple[str, Problem]]:
    from ..kernels.quant_matmul import OPERATOR, QuantMatmulSpec, WeightFormat
    from ..kernels.quant_matmul.space import fastest_activation
    from ..runtime.tuning import problem_of

    weight = WeightFormat.int4()
    for m in ROWS:
        activation = fastest_activation(m, weight, target)
        for size, (hidden, wide) in SIZES.items():
            for part, n, k, epilogue in (
                ("gate-up", 2 * wide, hidden, "silu_pair"),
                ("down", hidden, wide, "none"),
            ):
                spec = QuantMatmulSpec(n, k, weight, activation, "float32", epilogue)
                name = f"{size} {part} M={m}"
                found = problem_of(OPERATOR, spec, {"m": m}, target, threads, title=name, fixed=True)
                if found is not None:
                    yield name, found


def _attention(target: Target, threads: int) -> Iterator[tuple[str, Problem]]:
    from ..kernels.attention import OPERATOR, AttentionSpec
    from ..kernels.attention.space import fastest_math
    from ..runtime.tuning import problem_of

    for phase, sizes in ATTENTION.items():
        for heads, (query, shared, dim) in HEADS.items():
            for tq, tk in sizes:
                math = fastest_math(tq, "bfloat16", target)
                mask = "none" if tq == 1 else "causal"  # as a decode step has it
                spec = AttentionSpec(
                    query, shared, dim, dim, mask=mask, kv_dtype="bfloat16", layout="blocked", math=math
                )
                name = f"attention {phase} {heads} at {tk}"
                found = problem_of(
                    OPERATOR, spec, {"tq": tq, "tk": tk}, target, threads, title=name, fixed=True
                )
                if found is not None:
                    yield name, found


def search(target: Target, threads: int, only: str, seconds: float, wall: float, settle: bool) -> None:
    """Tune each problem for `seconds`, or time its best again; end after `wall` seconds."""
    from ..runtime.tuning import ChildEvaluator, tune_problems

    end = time.monotonic() + wall
    done = _settled(target)
    with ChildEvaluator() as evaluator:
        for name, problem in problems(target, threads):
            if not _is_asked(name, only) or len(problem.space) < 2 or (settle and name in done):
                continue
            if time.monotonic() > end - 5:
                print("the time is over; the same command goes on", flush=True)
                return
            (outcome,) = tune_problems(
                [problem], seconds=seconds, more=settle, most_trials=0 if settle else 1 << 30,
                evaluator=evaluator,
            )  # fmt: skip
            if settle and outcome.state == "tuned":
                done.append(name)
                _settled(target, done)
            record, text = outcome.record, outcome.note
            if record is not None and record.seconds:
                gain = record.default_seconds / record.seconds
                text = f"{gain:.2f}x {record.configuration} {outcome.note}"
            print(f"{name}: {outcome.state}, {outcome.trials} trials, {text}", flush=True)
    if settle:
        _settled(target, [])


def _is_asked(name: str, only: str) -> bool:
    return any(text.strip() in name for text in only.split(","))


def _settled(target: Target, names: list[str] | None = None) -> list[str]:
    """Return, or keep, which problems this round of settling is through with."""
    from ..compiler.artifacts import cache_root

    path = cache_root() / "tuning" / f"settled-{target.isa}.json"
    if names is not None:
        write_text(path, json.dumps(names))
        return names
    return json.loads(path.read_text()) if path.exists() else []


def measure(target: Target, threads: int, only: str, wall: float, output: Path, passes: int) -> None:
    """Time default and tuned configurations with the limits in turn; add a row a problem to `output`."""
    from ..runtime.tuning import ChildEvaluator

    end = time.monotonic() + wall
    rows = json.loads(output.read_text())["rows"] if output.exists() else []
    known = {row["problem"] for row in rows if row["steady"]}
    own = {r.key: r for r, origin in RecordStore().all() if origin == "yours"}
    with ChildEvaluator() as evaluator:
        for name, problem in problems(target, threads):
            if not _is_asked(name, only) or name in known:
                continue
            if time.monotonic() > end - 8:
                print("the time is over; the same command goes on", flush=True)
                return
            default, record = problem.space.default, own.get(problem.key)
            tuned = problem.space.complete(record.configuration) if record else default
            chosen = [default] + ([tuned] if tuned != default else [])
            try:
                found = evaluator.limits(problem, chosen, passes, end - time.monotonic())
            except EdgeFormerError as error:
                print(f"{name}: {error}", flush=True)
                continue
            rows = [row for row in rows if row["problem"] != name]
            rows.append(_row(name, problem, tuned, record, found))
            write_text(output, json.dumps({"device": _device(target, threads), "rows": rows}, indent=1))
            print(json.dumps(rows[-1]), flush=True)


def _device(target: Target, threads: int) -> dict[str, Any]:
    from ..runtime.tuning import versions

    return {"target": target.name, "isa": target.isa, "mcpu": target.mcpu, "threads": threads,
            "l3": target.l3, "versions": versions()}  # fmt: skip


def _row(name: str, problem: Problem, tuned: dict[str, Any], record: Any, found: Any) -> dict[str, Any]:
    """Return what was measured of a problem: seconds, limit, and fractions of it."""
    limits = found.limits
    peaks = {kind: limits[kind] for kind in ("int8", "float", "bfloat16") if limits.get(kind)}
    peak = limits.get("int8" if found.arithmetic == "int8" else found.arithmetic, math.inf)
    memory, compute = found.nbytes / limits["read"], found.operations / peak
    default, best = found.samples[0], found.samples[-1]
    row = {
        "problem": name, "phase": problem.wanted.phase, "sizes": problem.wanted.sizes,
        "arithmetic": found.arithmetic, "bytes": found.nbytes, "operations": found.operations,
        "copies": found.copies, "read": limits["read"], "peaks": peaks,
        "limit": "bytes" if memory >= compute else "operations",
        "default_seconds": default.seconds, "default_spread": default.spread,
        "tuned_seconds": best.seconds, "tuned_spread": best.spread,
        "default_fraction": max(memory, compute) / default.seconds,
        "tuned_fraction": max(memory, compute) / best.seconds,
        "default_of_tuned": best.seconds / default.seconds, "moved": found.moved,
        "configuration": problem.space.essential(tuned), "record": record is not None,
    }  # fmt: skip
    # Faster than the limit: the machine was slower while the limit was measured.
    row["steady"] = found.moved <= MOVED and row["tuned_fraction"] <= _MOST_FRACTION
    if "int8" in peaks and found.arithmetic == "bfloat16":
        row["of_int8_peak"] = found.operations / best.seconds / peaks["int8"]
    return row


def table(path: Path) -> str:
    """Return a measurement as a Markdown table."""
    rows = sorted(json.loads(path.read_text())["rows"], key=_order)
    lines = [
        "| problem | limit | default | tuned | default / limit | tuned / limit | gain | found |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        rate = f"{r['read'] / 1e9:.1f} GB/s"
        if r["limit"] == "operations":
            rate = f"{r['peaks'][r['arithmetic']] / 1e12:.2f} TOP/s {r['arithmetic']}"
        extra = f" ({r['of_int8_peak']:.2f} of int8)" if "of_int8_peak" in r else ""
        gain = r["default_seconds"] / r["tuned_seconds"]
        found = " ".join(f"{k}={v}" for k, v in r["configuration"].items()) if gain != 1 else "the default"
        found += "" if r["steady"] else " (the machine's speed moved)"
        lines.append(
            f"| {r['problem']} | {rate} | {_time(r['default_seconds'])} | {_time(r['tuned_seconds'])} |"
            f" {r['default_fraction']:.2f} | {r['tuned_fraction']:.2f}{extra} | {gain:.2f} | {found} |"
        )
    gains = [r["default_seconds"] / r["tuned_seconds"] for r in rows]
    mean = math.exp(sum(map(math.log, gains)) / len(gains)) if gains else 1.0
    return "\n".join([*lines, "", f"Geometric mean of the gains over {len(gains)} problems: {mean:.3f}."])


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return where a row stands: products by M and size, then attention."""
    sizes = row["sizes"]
    return (
        "m" not in sizes,
        sizes.get("m", 0),
        row["phase"],
        sizes.get("n", 0) * sizes.get("k", 0),
        row["problem"],
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("do", choices=("search", "settle", "measure", "table", "list"))
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("tuned.json"))
    parser.add_argument("--seconds", type=float, default=20.0, help="of the search for each problem")
    parser.add_argument("--wall", type=float, default=float(1 << 20))
    parser.add_argument("--only", default="", help="problems whose name has one of these texts: A,B")
    parser.add_argument("--target", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--passes", type=int, default=11)
    options = parser.parse_args()
    if options.do == "table":
        print(table(options.file or options.output))
        return
    target, threads = Target.parse(options.target), options.threads or available_cores()
    target = dataclasses.replace(target, l3=target.l3 or Target.parse("auto").l3)  # this host's cache
    if options.do == "list":
        for name, problem in problems(target, threads):
            print(f"{name}: {len(problem.space)} configurations of phase {problem.wanted.phase}")
    elif options.do == "measure":
        measure(target, threads, options.only, options.wall, options.output, options.passes)
    else:
        settle = options.do == "settle"
        search(target, threads, options.only, options.seconds, options.wall, settle)


if __name__ == "__main__":
    main()
