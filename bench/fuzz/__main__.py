"""Fuzz the loaders: `python -m edgeformer.bench.fuzz [--seconds N] [--seed N] [--target NAME]`.

Every case runs in a worker process: a crash, a hang, an error that is not an EdgeFormerError, more than a
second of CPU time or more memory than twice the input and 64 MB is a finding. A finding's case is made again
by `--seed SEED --target NAME --case NUMBER`. Exit code 1 when there is one.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import select
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

HANG = 20.0  # seconds of CPU time in one case
SILENCE = 900.0  # seconds of wall time, on a machine that is busy
LIMIT_SECONDS = 1.0  # of CPU time
LIMIT_BYTES = 64 << 20
_STATUS = Path("/proc/self/status")


def _memory(field: str) -> int:
    """Bytes of a line of /proc/self/status (VmRSS, VmHWM); 0 where there is none."""
    if not _STATUS.exists():
        return 0
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def run_case(target: str, seed: int, number: int) -> dict[str, Any]:
    """Make and run one case; return what happened."""
    from ...compiler.errors import EdgeFormerError
    from .cases import TARGETS

    with tempfile.TemporaryDirectory(prefix="edgeformer-fuzz-") as name:
        size, call = TARGETS[target](Path(name), random.Random(f"{target} {seed} {number}"))
        if _STATUS.exists():
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before, start = _memory("VmRSS"), time.process_time()
        try:
            call()
            outcome, problem = "accepted", ""
        except EdgeFormerError as error:
            outcome, problem = type(error).__name__, ""
        except Exception as error:  # noqa: BLE001  that is the finding
            outcome, problem = "untyped", f"{type(error).__name__}: {str(error)[:300]}"
        seconds = time.process_time() - start
        used = _memory("VmHWM") - before
    if not problem and seconds > LIMIT_SECONDS:
        problem = f"{seconds:.2f} s"
    if not problem and used > 2 * size + LIMIT_BYTES:
        problem = f"{used / 1e6:.0f} MB for an input of {size / 1e6:.1f} MB"
    return {"case": number, "outcome": outcome, "problem": problem, "seconds": seconds}


def work(target: str, seed: int, first: int, seconds: float) -> None:
    """Run cases from `first` on, one line each before and after."""
    warnings.simplefilter("ignore")
    run_case(target, seed, -1)  # what is imported late, and torch's own memory
    start = time.process_time()
    while time.process_time() - start < seconds:
        print(json.dumps({"case": first}), flush=True)
        print(json.dumps(run_case(target, seed, first)), flush=True)
        first += 1


def supervise(target: str, seed: int, seconds: float) -> tuple[collections.Counter[str], list[str], float]:
    """Run a target in workers for some CPU seconds; return outcomes, findings and the slowest call."""
    outcomes: collections.Counter[str] = collections.Counter()
    findings, slowest, number, spent = [], 0.0, 0, 0.0
    while spent < seconds:
        command = [
            sys.executable,
            "-m",
            __spec__.name.removesuffix(".__main__"),
            "--worker",
            "--target",
            target,
        ]
        command += ["--seed", str(seed), "--case", str(number), "--seconds", str(seconds - spent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as worker:
            assert worker.stdout is not None and worker.stderr is not None
            started, hung = time.monotonic(), False
            while True:
                hung = not _speaks(worker)
                line = b"" if hung else worker.stdout.readline()
                if not line:
                    break
                event = json.loads(line)
                number = event["case"]
                if "outcome" in event:
                    outcomes[event["outcome"]] += 1
                    slowest = max(slowest, event["seconds"])
                    if event["problem"]:
                        findings.append(f"{target} case {number}: {event['problem']}")
                    number += 1
            spent = seconds if worker.wait() == 0 else spent + time.monotonic() - started
            if worker.returncode:
                what = "hangs" if hung else f"ends the process ({worker.returncode})"
                findings.append(f"{target} case {number} {what}: {worker.stderr.read().decode()[-300:]}")
                number += 1
        if len(findings) > 50:
            break
    return outcomes, findings, slowest


def _speaks(worker: subprocess.Popen[bytes]) -> bool:
    """Wait for a worker's next line; kill it, and return False, when it hangs."""
    import psutil

    process, start = psutil.Process(worker.pid), time.monotonic()
    before = sum(process.cpu_times()[:2])
    assert worker.stdout is not None
    while not select.select([worker.stdout], [], [], 1.0)[0]:
        try:
            used = sum(process.cpu_times()[:2]) - before
        except psutil.NoSuchProcess:
            return True
        if used > HANG or time.monotonic() - start > SILENCE:
            worker.kill()
            return False
    return True


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1200.0, help="CPU seconds in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", default="")
    parser.add_argument("--case", type=int)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.target, options.seed, options.case, options.seconds)
        return
    if options.case is not None:
        print(json.dumps(run_case(options.target, options.seed, options.case), indent=1))
        return
    targets = (
        [options.target] if options.target else ["gguf", "hugging_face", "quantised", "compiled", "templates"]
    )
    found = []
    for target in targets:
        outcomes, findings, slowest = supervise(target, options.seed, options.seconds / len(targets))
        counts = ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
        print(f"{target}: {sum(outcomes.values())} cases ({counts}); slowest {slowest:.2f} s", flush=True)
        for finding in findings:
            print(f"  {finding}", flush=True)
        found += findings
    print(f"{len(found)} findings with the seed {options.seed}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
