"""MLPerf-style scenarios: how long queries take one by one, eight at a time, and how many finish a second.

Single-stream sends a query of one sample when the last one is answered and tells the 90th percentile of
the latency; multi-stream does so with queries of eight samples and tells the 99th; offline has all samples
at once and tells the throughput. A sample is a prompt of random tokens and a fixed number of new ones.
Unlike MLPerf, queries are few, so that a run takes minutes: `few` says when fewer than ten queries lie
beyond a percentile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .child import ChildEngine
from .options import MULTI_STREAM

PERCENTILES = {"single-stream": 90, "multi-stream": 99}


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile: the smallest value that `percent` of all do not exceed."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(percent / 100 * len(ranked)) - 1)]


def plan(scenario: str, queries: int) -> list[int]:
    """Return the samples of each query: `queries` samples in all, at least one query."""
    if scenario == "single-stream":
        return [1] * queries
    if scenario == "multi-stream":
        return [MULTI_STREAM] * max(1, queries // MULTI_STREAM)
    full, rest = divmod(queries, MULTI_STREAM)
    return [MULTI_STREAM] * full + [rest] * bool(rest)


def run_query(engine: ChildEngine, samples: int, prompt: int, generate: int) -> dict[str, float]:
    """Answer one query and return its seconds to the first tokens and to the last."""
    first, last = engine.query(prompt, generate, samples)
    return {"samples": samples, "first": first, "last": last}


def summary(
    scenario: str, answered: Sequence[dict[str, float]], prompt: int, generate: int
) -> dict[str, Any]:
    """Return a scenario's figures: throughput, percentiles of latency and of the time to first token."""
    seconds = [query["last"] for query in answered]
    samples = sum(int(query["samples"]) for query in answered)
    new_tokens = samples * generate
    facts: dict[str, Any] = {
        "scenario": scenario,
        "prompt": prompt,
        "generate": generate,
        "queries": len(answered),
        "samples_per_second": round(samples / sum(seconds), 4),
        "tokens_per_second": round(new_tokens / sum(seconds), 3),
        "latency": {f"p{p}": round(percentile(seconds, p), 5) for p in (50, 90, 99)},
        "first_token": {
            f"p{p}": round(percentile([q["first"] for q in answered], p), 5) for p in (50, 90, 99)
        },
    }
    if generate > 1:
        each = [(q["last"] - q["first"]) / (generate - 1) for q in answered]
        facts["seconds_per_token"] = {f"p{p}": round(percentile(each, p), 6) for p in (50, 90, 99)}
    percent = PERCENTILES.get(scenario)
    if percent is not None:
        facts["metric"] = {f"latency_p{percent}": facts["latency"][f"p{percent}"]}
        facts["few"] = len(answered) * (100 - percent) / 100 < 10
    else:
        facts["metric"] = {"samples_per_second": facts["samples_per_second"]}
    return facts
