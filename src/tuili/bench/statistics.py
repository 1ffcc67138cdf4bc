"""Statistics of samples in plain Python: percentiles, and the 95 % confidence interval of a mean."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Student's t, two-sided 95 %, for 1 to 30 degrees of freedom; beyond, the normal's 1.96.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest ranks, as numpy's default; 0 for no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def median(values: Sequence[float]) -> float:
    return percentile(values, 50)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def std(values: Sequence[float], ddof: int = 0) -> float:
    """Standard deviation; ``ddof`` 0 as in vLLM's report, 1 for an estimate from a sample."""
    if len(values) <= ddof:
        return 0.0
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - ddof))


def ci95(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % confidence interval of the mean by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    t = _T95[freedom - 1] if freedom <= len(_T95) else 1.96
    half = t * std(values, ddof=1) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def spread(values: Sequence[float]) -> dict[str, float]:
    """mean, std, median, p90, p95, p99, min and max of a sample."""
    return {
        "mean": mean(values),
        "std": std(values),
        "median": median(values),
        **{f"p{p}": percentile(values, p) for p in (90, 95, 99)},
        "min": min(values, default=0.0),
        "max": max(values, default=0.0),
    }
