"""Two sets of tuning records on a whole model, in turn: `python -m edgeformer.bench.tuned_pairs MODEL A B`.

A and B are cache folders (EDGEFORMER_CACHE_DIR), such as of a short and a long `edgeformer tune`. Prints the
median over pairs of the time with A over the time with B, of prefill and of decode: above 1, B is faster.
Both are loaded several times, in turn first: where its weights come to lie makes the same program faster or
slower by some percent.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any


def measure(model: Any, ids: list[int], new: int) -> tuple[float, float]:
    """Return seconds of a prompt and of its decode steps."""
    model.generate(ids, max_tokens=new, ignore_eos=True)
    stats = model.last_run
    return len(ids) / stats.prefill_speed, new / stats.decode_speed


def main() -> None:
    """Load the model with each set of records, and take turns."""
    from ..model.loading import load
    from ..runtime import dispatch, recorded

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folders", type=Path, nargs=2)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--loads", type=int, default=5, help="each load puts the weights elsewhere")
    parser.add_argument("--wall", type=float, default=float(1 << 20))
    options = parser.parse_args()
    end = time.monotonic() + options.wall
    ratios: list[tuple[float, float]] = []
    models: dict[int, Any] = {}
    for block in range(options.loads):
        models.clear()  # before the next two take their memory
        for which in (0, 1) if block % 2 else (1, 0):
            os.environ["EDGEFORMER_CACHE_DIR"] = str(options.folders[which])
            recorded.forget()
            dispatch.forget()
            models[which] = load(options.model)
        ids = [i % models[0].config.vocab_size for i in range(7, 7 + options.prompt)]
        for model in models.values():
            measure(model, ids, options.new)
        for pair in range(-(-options.pairs // options.loads)):
            if time.monotonic() > end:
                break
            found: dict[int, tuple[float, float]] = {}
            for which in (0, 1) if pair % 2 else (1, 0):
                found[which] = measure(models[which], ids, options.new)
            ratios.append((found[0][0] / found[1][0], found[0][1] / found[1][1]))
    row: dict[str, Any] = {"pairs": len(ratios)}
    for i, name in enumerate(("prefill", "decode")):
        column = [ratio[i] for ratio in ratios]
        low, middle, high = statistics.quantiles(column, n=4)
        row[name] = {"median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}
    for name, model in zip("ab", (models[0], models[1])):
        program = getattr(model.step, "program", None)
        row[name] = {"record": getattr(program, "record", "op by op")}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
