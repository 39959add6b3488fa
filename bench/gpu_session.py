"""One run on a GPU box: every kernel verified, then timed beside what PyTorch offers, into one JSON file.

`make gpu-session` takes at most 8 minutes. `--dry` runs the same steps at tiny sizes on Triton's CPU
interpreter: it shows that the session works, its times mean nothing and are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from ..compiler.errors import EdgeFormerError
from ..compiler.records import write_text
from .gpu_ops import OURS, GpuOptions, bench_gpu, render_gpu


def main() -> None:
    """Run the session and write the report; exit code 1 when a kernel is wrong or did not run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-session.json"))
    parser.add_argument("--device", default="cuda", choices=["cuda", "xpu"])
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        chosen = GpuOptions("cpu" if options.dry else options.device)
        rows = bench_gpu(chosen, lambda name: print(name, flush=True))
    except EdgeFormerError as error:
        print(f"error: {error}; --dry shows the session on a CPU", file=sys.stderr)
        sys.exit(2)
    write_text(options.out.absolute(), json.dumps(rows, indent=1))
    print(render_gpu(rows, "md"))
    sys.exit(any(row["status"] in ("wrong", "failed") for row in rows if row["engine"] == OURS))


if __name__ == "__main__":
    main()
