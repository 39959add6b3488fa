"""Every default Triton kernel compiled for every GPU architecture, none needed: `make cross`.

Each is read from its machine code and held to the rules: matrix instructions in the hot loop of contracting
kernels, no scratch memory in any hot loop, and most bytes in loads of 8 or more a lane. `--table FILE` writes
the figures as Markdown; exit code 1 when a rule is broken. What was read once is kept in the cache folder
under a digest of the kernel's source: a run that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from ..compiler.artifacts import cache_root
from ..compiler.backends import triton_inspect
from ..compiler.backends.triton_cost import problems
from ..compiler.backends.triton_gpu import (
    ARCHITECTURES,
    Inspection,
    KernelBuild,
    compile_kernel,
    inspect,
    versions,
)
from ..compiler.errors import BuildError
from ..compiler.records import write_text
from ..kernels.shared.gpu_builds import builds

_PIECE = 4  # kernels that a process compiles before it says so


def check(arch: str, dtype: str, names: Iterable[str]) -> list[dict[str, Any]]:
    """Compile and read the named default kernels for one architecture."""
    wanted = set(names)
    found = [kernel for kernel in builds(ARCHITECTURES[arch], dtype) if kernel.name in wanted]
    return [_row(kernel, arch, dtype) for kernel in found]


def _row(kernel: KernelBuild, arch: str, dtype: str) -> dict[str, Any]:
    row: dict[str, Any] = {"architecture": arch, "dtype": dtype, "kernel": kernel.name}
    kept = cache_root() / "cross" / f"{digest(kernel, arch)}.json"
    try:
        figures = json.loads(kept.read_text())
    except (OSError, ValueError):
        start = time.perf_counter()
        try:
            figures = vars(inspect(compile_kernel(kernel, arch), arch))
        except BuildError as error:
            return {**row, "problems": [str(error)]}
        figures = {**figures, "seconds": round(time.perf_counter() - start, 2)}
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, json.dumps(figures))
    numbers = {**figures, "loads": {int(width): n for width, n in figures["loads"].items()}}
    seconds = numbers.pop("seconds")
    found = Inspection(**numbers)
    row |= {**numbers, "load_bytes": found.load_bytes, "seconds": seconds}
    return {**row, "problems": problems(kernel, ARCHITECTURES[arch], found)}


def digest(kernel: KernelBuild, arch: str) -> str:
    """Return a digest of all that a kernel's figures come from: its source, constants, tool versions."""
    about = [
        kernel.function.cache_key, sorted(kernel.signature.items()), sorted(kernel.options.items()),
        sorted((k, str(v)) for k, v in kernel.constants.items()), kernel.divisible, arch, versions(),
        Path(triton_inspect.__file__).read_text(),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]


def run(archs: list[str], dtypes: list[str], only: str, jobs: int) -> Iterator[dict[str, Any]]:
    """Yield the row of every kernel, as pieces of the list are done by `jobs` processes."""
    pieces = []
    for dtype in dtypes:
        for arch in archs:
            names = [k.name for k in builds(ARCHITECTURES[arch], dtype) if only in k.name]
            pieces += [(arch, dtype, names[i : i + _PIECE]) for i in range(0, len(names), _PIECE)]
    if jobs == 1:
        for piece in pieces:
            yield from check(*piece)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for rows in pool.map(check, *zip(*pieces)):
            yield from rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the figures as Markdown, one line a kernel and architecture."""
    lines = ["| kernel | architecture | registers | scratch | matrix | load bytes | KiB | warps |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in sorted(rows, key=lambda r: (r["kernel"], r["architecture"])):
        if "registers" not in row:
            lines.append(f"| {row['kernel']} | {row['architecture']} | not compiled | | | | | |")
            continue
        registers = f"{row['registers']}+{row['accumulators']}" if row["accumulators"] else row["registers"]
        shared = round(row["shared_bytes"] / 1024, 1)
        lines.append(
            f"| {row['kernel']} | {row['architecture']} | {registers} | {row['scratch']} | {row['matrix']} | "
            f"{row['load_bytes'] or '-'} | {shared} | {row['warps']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Check the architectures and types asked for; print what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="*", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--dtype", nargs="*", default=["fp16"], choices=["fp16", "bf16"])
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--table", type=Path, help="write the figures of the first type as Markdown")
    parser.add_argument("--json", type=Path, help="write all figures")
    options = parser.parse_args()
    start, rows = time.monotonic(), []
    for row in run(options.arch, options.dtype, options.only, options.jobs):
        rows.append(row)
        if row["problems"]:
            name = f"{row['architecture']} {row['dtype']} {row['kernel']}"
            print(f"  {name}: {'; '.join(row['problems'])}", flush=True)
    bad = sum(bool(row["problems"]) for row in rows)
    taken = time.monotonic() - start
    print(f"{len(rows)} kernels on {len(options.arch)} architectures, {bad} with problems, {taken:.0f} s")
    if options.json:
        options.json.write_text(json.dumps({"versions": versions(), "kernels": rows}, indent=1))
    if options.table:
        first = [row for row in rows if row["dtype"] == options.dtype[0]]
        head = f"{versions()}, {options.dtype[0]}, default tiles; written by `make cross-table`.\n\n"
        options.table.write_text(head + table(first))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
