"""Reports: records to figures, with the field names and definitions of ``vllm bench serve`` (interfaces.md 5.10).

Times are milliseconds in fields that end in ``_ms``, throughputs are per second of wall time. Fields that vLLM does
not have (``sum_of_parts``, ``ci95_*``, ``cached_tokens``, ``mean_start_lag_ms``) are additions; nothing is renamed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from tuili.base.errors import ConfigError, nearest
from tuili.bench.load import LoadRun, Record
from tuili.bench.statistics import ci95, mean, median, percentile, std

#: What a goodput limit can be about.
LIMITED = ("ttft", "tpot", "e2el")
PERCENTILES = (90, 95, 99)


def parse_goodput(terms: Iterable[str]) -> dict[str, float]:
    """``["ttft:200", "tpot:50"]`` to limits in milliseconds; ConfigError for anything else."""
    limits: dict[str, float] = {}
    for term in terms:
        name, colon, value = term.partition(":")
        if name not in LIMITED:
            raise ConfigError(
                f"goodput is in ttft, tpot and e2el, not {name!r}.{nearest(name, ('ttft', 'tpot', 'e2el'))}"
            )
        try:
            limits[name] = float(value)
        except ValueError:
            raise ConfigError(f"goodput is written like ttft:200 (milliseconds), got {term!r}") from None
        if not colon or not limits[name] > 0:
            raise ConfigError(f"a goodput limit must be positive, got {term!r}")
    return limits


def is_good(record: Record, limits: dict[str, float]) -> bool:
    """Does a completed request meet all limits? One token has no TPOT and so meets it."""
    if record.error is not None:
        return False
    seen = {"ttft": record.ttft, "tpot": record.tpot or 0.0, "e2el": record.e2e}
    return all(seen[name] * 1000 <= limit for name, limit in limits.items())


def samples(records: Sequence[Record]) -> dict[str, list[float]]:
    """Milliseconds per metric over completed requests; ITL pools the gaps of all."""
    return {
        "ttft": [1000 * r.ttft for r in records],
        "tpot": [1000 * r.tpot for r in records if r.tpot is not None],
        "itl": [1000 * gap for r in records for gap in r.itls],
        "e2el": [1000 * r.e2e for r in records],
    }


def summarize(run: LoadRun, goodput: dict[str, float] | None = None) -> dict[str, Any]:
    """The figures of one run."""
    done = [record for record in run.records if record.error is None]
    wall = run.duration
    inputs, outputs = sum(r.input_tokens for r in done), sum(r.output_tokens for r in done)
    summary: dict[str, Any] = {
        "duration": wall,
        "completed": len(done),
        "failed": len(run.records) - len(done),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "cached_tokens": sum(r.cached_tokens for r in done),
        "request_throughput": len(done) / wall,
        "request_goodput": sum(is_good(r, goodput) for r in done) / wall if goodput else None,
        "output_throughput": outputs / wall,
        "total_token_throughput": (inputs + outputs) / wall,
        "max_concurrent_requests": run.peak,
        "output_tokens_estimated": any(r.estimated for r in done),
        "mean_start_lag_ms": 1000 * mean([r.start - r.due for r in run.records]),
        "sum_of_parts": sum_of_parts(run),
    }
    for metric, values in samples(done).items():
        summary |= {f"mean_{metric}_ms": mean(values), f"median_{metric}_ms": median(values)}
        summary |= {f"std_{metric}_ms": std(values)}
        summary |= {f"p{p}_{metric}_ms": percentile(values, p) for p in PERCENTILES}
        summary[f"ci95_mean_{metric}_ms"] = ci95(values)
    return summary


def sum_of_parts(run: LoadRun) -> dict[str, float]:
    """The law of INVENTORY row 35: what the requests say they spent is what the clock says was spent.

    ``first`` waiting for first pieces, ``decode`` between pieces, ``close`` after the last one, ``idle`` lanes with
    nothing to do; together ``lanes`` x wall (without a limit: the integral of live requests). ``ratio`` must be 1
    within 1 %.
    """
    first = math.fsum(r.ttft for r in run.records)
    decode = math.fsum(sum(r.itls) for r in run.records)
    close = math.fsum(r.end - r.start - r.e2e for r in run.records)
    idle = max(0.0, run.lanes * run.duration - run.live_seconds) if run.lanes else 0.0
    wall = run.lanes * run.duration if run.lanes else run.live_seconds
    total = first + decode + close + idle
    parts = {"first": first, "decode": decode, "close": close, "idle": idle, "wall": wall}
    return parts | {"ratio": total / wall if wall else 1.0}


#: Over repeats these are added up; every other figure is a median.
COUNTS = ("duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "cached_tokens")


def over_repeats(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One summary of several runs: counts and durations added up, medians of the rest, and for throughputs all values
    and the 95 % interval of their mean (None for one run)."""
    result = dict(summaries[0])
    for key, value in summaries[0].items():
        values = [summary[key] for summary in summaries]
        if key in COUNTS:
            result[key] = sum(values)
        elif isinstance(value, float):
            result[key] = median(values)
    for key in ("request_throughput", "output_throughput", "total_token_throughput"):
        values = [summary[key] for summary in summaries]
        result[f"{key}_repeats"] = values
        result[f"{key}_ci95"] = ci95(values)
    result["repeats"] = len(summaries)
    return result


def detail(run: LoadRun) -> dict[str, Any]:
    """Raw series per request, in vLLM's field names (seconds)."""
    records = run.records
    return {
        "input_lens": [r.input_tokens for r in records],
        "output_lens": [r.output_tokens for r in records],
        "start_times": [r.start for r in records],
        "ttfts": [r.ttft for r in records],
        "itls": [r.itls for r in records],
        "e2els": [r.e2e for r in records],
        "errors": [r.error or "" for r in records],
    }


def failures(records: Sequence[Record]) -> dict[str, int]:
    """How many requests failed with each message, most first."""
    counts: dict[str, int] = {}
    for record in records:
        if record.error is not None:
            counts[record.error] = counts.get(record.error, 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))
