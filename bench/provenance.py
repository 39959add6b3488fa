"""Where a row comes from: schema, run, commit, device, threads, governor, versions; in every row."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import os
import subprocess
import uuid
from pathlib import Path
from typing import Any

from .device import device, versions

SCHEMA_VERSION = 2
PACKAGE = Path(__file__).resolve().parent.parent


def new_run_id() -> str:
    """Return a fresh name for a run."""
    return uuid.uuid4().hex[:12]


def now() -> str:
    """Return the time (UTC, ISO 8601, seconds)."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def fingerprint() -> str:
    """Return a digest of what makes this device fast or slow: CPU, features, cores, caches, memory.

    Memory counts in whole GiB, since the kernel keeps a little less after each update.
    """
    facts = {k: v for k, v in device().items() if k not in ("os", "memory_bytes", "target", "isa")}
    facts["memory_gib"] = round(device()["memory_bytes"] / 2**30)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def commit() -> str | None:
    """Return the package's git commit, "+" behind it where files differ; None outside of a repository."""
    try:
        found = _git("rev-parse", "--show-toplevel", "HEAD").split()
        if len(found) != 2 or Path(found[0]).resolve() != PACKAGE:  # installed inside of another repository
            return None
        return found[1] + ("+" if _git("status", "--porcelain", "--untracked-files=no").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(PACKAGE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout


def governor(root: Path = Path("/sys/devices/system/cpu")) -> str | None:
    """Return the cores' frequency governors, comma-separated; None where the system does not tell."""
    found = set()
    for path in root.glob("cpu[0-9]*/cpufreq/scaling_governor"):
        try:
            found.add(path.read_text().strip())
        except OSError:
            continue
    return ",".join(sorted(found)) or None


def provenance(run_id: str, threads: int, started: str) -> dict[str, Any]:
    """Return the fields that all rows of a run share."""
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "time": started,
        "commit": commit(),
        "threads": threads,
        "governor": governor(),
        "virtual_machine": virtual_machine(),
        "fingerprint": fingerprint(),
        "environment": {
            k: v for k, v in sorted(os.environ.items()) if k.startswith(("OMP_", "GOMP_", "MKL_"))
        },
        "versions": versions(),
        "device": device(),
    }


def virtual_machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Return whether a hypervisor runs this system, None where the system does not tell."""
    try:
        return " hypervisor" in cpuinfo.read_text(errors="replace")
    except OSError:
        return None
