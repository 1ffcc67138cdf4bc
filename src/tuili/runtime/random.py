"""Random numbers as a function of (seed, position): the same tokens whatever the batch or the schedule."""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195)."""
    for shift, factor in _MIX:
        x = (x ^ (x >> shift)) * factor
    return x ^ (x >> np.uint64(31))


def uniform(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One float64 in [0, 1) per pair of ``seeds`` and ``positions`` [n] (any 64-bit integers)."""
    state = _mix(seeds.astype(np.int64).view(np.uint64) + _GOLDEN)  # arrays wrap around without a word
    state = _mix(state + (positions.astype(np.int64).view(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (state >> np.uint64(11)) * (1.0 / 2**53)
