"""What this machine can do, measured now by the library's own loops and team: the limits that figures are shares of."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from tuili.base.errors import ConfigError, nearest
from tuili.ops.cpu import library as lib
from tuili.ops.cpu.packed import Arena

#: Bytes that one call reads at least, a small working set again and again: a call costs microseconds.
LEAST = 32 << 20
#: int4: weights of 4 bits times bytes.
KINDS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}


def _best(rate: Callable[[], float], seconds: float) -> float:
    """The best rate of repeated measurements: what others take from a shared machine is no limit of it."""
    if lib.library is None:
        raise ConfigError(f"the machine can not be probed: {lib.why}")
    best, until = 0.0, time.perf_counter() + seconds
    while not best or time.perf_counter() < until:
        best = max(best, rate())
    return best


def read_bandwidth(bytes: int = 256 << 20, seconds: float = 0.3, memory: torch.Tensor | None = None) -> float:
    """Bytes per second that the team reads from ``bytes`` of memory on huge pages (or from ``memory``).

    Sizes below a cache's measure that cache. ConfigError where the library was not built.
    """
    if memory is None:
        memory = Arena().empty((bytes,), torch.uint8).fill_(1)

    rounds = max(1, LEAST // memory.nbytes)

    def rate() -> float:
        began = time.perf_counter()
        lib.library.tuili_probe_read(memory.data_ptr(), memory.nbytes, rounds)  # type: ignore[union-attr]
        return rounds * memory.nbytes / (time.perf_counter() - began)

    return _best(rate, seconds)


def peak(kind: str, seconds: float = 0.2) -> float:
    """Operations per second of products in registers, of a kind of ``KINDS``; multiply and add are two.

    On AVX2 bfloat16 is multiplied as float32, and int4 faster than int8, since its sums stay 16 bits. ConfigError for
    another kind, or where the library was not built.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind={kind!r} has no probe.{nearest(kind, KINDS)}")

    def rate() -> float:
        began = time.perf_counter()
        operations: int = lib.library.tuili_probe_multiply(KINDS[kind], 1 << 20)  # type: ignore[union-attr]
        return operations / (time.perf_counter() - began)

    return _best(rate, seconds)
