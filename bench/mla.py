"""Latent attention in decode beside the machine's limits: `python -m edgeformer.bench.mla`."""

from __future__ import annotations

import argparse
import json
import statistics
import time

from .probes import measure_limits


def main() -> None:
    """Time absorbed decode steps, probes of the limits between them; print one line."""
    import torch

    from ..kernels.mla import MlaSpec
    from ..runtime import ops
    from ..runtime.threads import set_threads

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--queries", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    threads = set_threads(options.threads or None)
    torch.manual_seed(0)
    spec = MlaSpec(options.heads, 512, 128, 64, 128, q_dtype="bfloat16")
    q = torch.randn(1, spec.num_heads, options.queries, spec.head_dim).bfloat16()
    cache = torch.randn(1, options.context, spec.latent_dim).bfloat16()
    w_uk = (torch.randn(spec.num_heads, 128, 512) / 22).bfloat16()
    w_uv = (torch.randn(spec.num_heads, 512, 128) / 22).bfloat16()
    q_nope, q_rope = q.split([128, 64], 3)
    work = spec.operations(options.queries, options.context)
    read = spec.cache_bytes(options.context) + spec.weight_bytes()
    limits, times, shares = None, [], []
    for _ in range(options.rounds):
        found = measure_limits(threads, repeats=2)
        limits = found if limits is None else limits.best(found)
        took = []
        for i in range(12):
            start = time.perf_counter()
            ops.mla(q_nope, q_rope, cache, w_uk, w_uv, mode="absorbed")
            if i >= 2:
                took.append(time.perf_counter() - start)
        times += took
        if found.float_peak:
            shares.append(work / statistics.median(took) / found.float_peak)
    assert limits is not None
    seconds, peak = statistics.median(times), limits.float_peak
    row = {
        "microseconds": round(seconds * 1e6, 1),
        "best_microseconds": round(min(times) * 1e6, 1),
        "gflops": round(work / seconds / 1e9),
        "of_peak": round(work / seconds / peak, 3) if peak else None,  # the best peak of all rounds
        "of_peak_by_round": round(statistics.median(shares), 3) if shares else None,
        "of_read_bandwidth": round(read / seconds / limits.read_bandwidth, 3),
        "megabytes": round(read / 1e6, 2),
        "float_peak_gflops": round(peak / 1e9) if peak else None,
        "read_gb_s": round(limits.read_bandwidth / 1e9, 1),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
