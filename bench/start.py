"""Time from process start to the first token of `edgeformer run DIR`, beside what `import torch` alone takes.

    python -m edgeformer.bench.start DIR [-r REPEATS]

Each repeat starts the two processes one after the other; the figures are medians with half the range.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from ..compiler.errors import EdgeFormerError


def first_token_seconds(command: list[str]) -> tuple[float, float, int]:
    """Run a command; return seconds until its first byte on stdout, CPU seconds, and peak memory in bytes."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1)
        seconds = time.perf_counter() - start
        process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if not first or process.returncode:
        raise EdgeFormerError(f"{' '.join(command)} ended with {process.returncode} and said nothing")
    scale = 1 if sys.platform == "darwin" else 1024
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * scale


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-r", "--repeats", type=int, default=5)
    parser.add_argument("-p", "--prompt", default="What is the capital of France?")
    options = parser.parse_args()
    run = [
        sys.executable,
        "-m",
        "edgeformer.cli",
        "run",
        str(options.folder),
        "-p",
        options.prompt,
        "-n",
        "8",
    ]
    torch = [sys.executable, "-c", "import torch; print(1)"]
    times: dict[str, list[float]] = {}
    peak = 0
    for _ in range(options.repeats):
        for name, command in (("import torch", torch), ("run to first token", run)):
            seconds, cpu, memory = first_token_seconds(command)
            times.setdefault(name, []).append(seconds)
            times.setdefault(f"{name}, CPU of all", []).append(cpu)
            peak = max(peak, memory)
    for name, values in times.items():
        half = (max(values) - min(values)) / 2
        print(f"{name:30} {statistics.median(values):.2f} s ± {half:.2f} (best {min(values):.2f})")
    print(f"{'peak memory':30} {peak / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
