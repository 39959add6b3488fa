"""The sparse MLP beside our own dense one, by density: `python -m edgeformer.bench.sparse_mlp`."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

DENSITIES = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def main() -> None:
    """Time dense, threshold and given-indices in turn at M = 1; print one line a density."""
    import torch

    from ..kernels.quant_matmul import CanonicalWeight, WeightFormat, pack
    from ..kernels.sparse_mlp import SparseMlpSpec
    from ..kernels.sparse_mlp.reference import gates
    from ..runtime import ops
    from ..runtime.threads import set_threads

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--neurons", type=int, default=8192)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--copies", type=int, default=4, help="weights in turn, so that no cache holds them")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    set_threads(options.threads or None)
    torch.manual_seed(0)
    fmt = WeightFormat.int4(options.group)
    spec = SparseMlpSpec(options.hidden, options.neurons, fmt, fmt)
    gate_up = CanonicalWeight.from_float(torch.randn(2 * spec.neurons, spec.hidden), fmt)
    down = CanonicalWeight.from_float(torch.randn(spec.hidden, spec.neurons), fmt)
    packed = [(pack(gate_up, pair=True), pack(down)) for _ in range(options.copies)]
    x = torch.randn(1, spec.hidden)
    largest = gates(spec, x, gate_up).abs().view(spec.blocks, spec.block).amax(1).sort(descending=True)

    def dense(gate_up: object, down: object) -> object:
        return ops.quant_matmul(ops.quant_matmul(x, gate_up, epilogue="silu_pair"), down)  # pyright: ignore

    for density in DENSITIES:
        count = round(density * spec.blocks)
        threshold = float(largest.values[count - 1]) * 0.9999 if count else 1e9
        indices = largest.indices[:count].sort().values.to(torch.int32)
        calls: dict[str, Callable[..., object]] = {
            "dense": dense,
            "threshold": lambda g, d, t=threshold: ops.sparse_mlp(x, g, d, threshold=t),
            "indices": lambda g, d, i=indices: ops.sparse_mlp(x, g, d, indices=i),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for repeat in range(options.repeats + 2):
            for name, call in calls.items():
                weights = packed[repeat % len(packed)]
                start = time.perf_counter()
                call(*weights)
                if repeat >= 2:
                    times[name].append(time.perf_counter() - start)
        ratios = {
            name: statistics.median(a / b for a, b in zip(times["dense"], times[name]))
            for name in ("threshold", "indices")
        }
        line: dict[str, object] = {"density": density, "blocks": count}
        line["dense"] = {
            "us": round(statistics.median(times["dense"]) * 1e6),
            "best_us": _best(times["dense"]),
        }
        for name in ratios:
            read = spec.weight_bytes(count)
            if name == "indices":
                read = SparseMlpSpec(spec.hidden, spec.neurons, fmt, fmt, select="indices").weight_bytes(
                    count
                )
            line[name] = {
                "us": round(statistics.median(times[name]) * 1e6),
                "best_us": _best(times[name]),
                "speedup": round(ratios[name], 2),
                "speedup_of_best": round(min(times["dense"]) / min(times[name]), 2),
                "megabytes": round(read / 1e6, 2),
                "byte_limit": round(spec.weight_bytes() / read, 2) if read else None,
            }
        print(json.dumps(line))


def _best(times: list[float]) -> int:
    return round(min(times) * 1e6)


if __name__ == "__main__":
    main()
