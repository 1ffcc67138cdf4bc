"""What this machine reaches: bytes per second by threads and working set, operations per second by threads and kind.

Measured by the loops of the C++ library where it has them ("tuili"), else and beside by torch's ops ("torch.sum",
"torch.mm"): those say what a library reaches, which may be far less than the machine can (products of bfloat16 and int8
on AVX2), or more (AMX). The better of both is the limit. Functions import torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tuili.base import hardware
from tuili.base.limits import Limits
from tuili.bench.provenance import provenance

#: The largest working set that is read: far beyond most machines' caches.
LARGEST = 256 << 20
#: Working sets, from a core's cache to memory, for whoever wants the limits at once.
FEW = (1 << 20, 8 << 20, 64 << 20, LARGEST)
KINDS = ("float32", "bfloat16", "int8", "int4")
#: Sides of the matrices that torch multiplies: the largest hide memory, where there is time for them.
SIDES = (128, 256, 512, 1024)
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def measure(
    threads: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
    seconds: float = 0.2,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Every figure for each number of ``threads`` (None: 1, 2, 4 ... all cores); ``seconds`` for each figure, of which
    the best run counts. ``sizes``: bytes of the working sets (None: ``working_sets()``). ``tick`` is called after each
    of the ``steps(threads, sizes)``."""
    threads = thread_counts() if threads is None else threads
    sizes = working_sets() if sizes is None else sizes
    found = caches()
    reads, writes, copies, peaks = [], [], [], []
    for count in threads:
        with team(count):
            for size in sizes:
                rate, how = read(size, seconds)
                level = level_of(size, count, found)
                reads.append({"threads": count, "bytes": size, "level": level, "per_second": rate, "how": how})
                tick()
            writes.append({"threads": count, "bytes": max(sizes), "per_second": write(max(sizes), seconds)})
            copies.append({"threads": count, "bytes": max(sizes), "per_second": copy(max(sizes), seconds)})
            for kind in KINDS:
                peaks += [{"threads": count, "kind": kind, **peak} for peak in multiply(kind, seconds)]
                tick()
    return {
        "benchmark": "machine",
        "caches": found,
        "reads": reads,
        "writes": writes,
        "copies": copies,
        "peaks": peaks,
        "provenance": provenance(),
    }


def limits(threads: int | None = None, sizes: Sequence[int] = FEW, seconds: float = 0.1) -> Limits:
    """What ``threads`` threads (None: all cores) reach with working sets of ``sizes`` bytes and with every kind of
    product; ``seconds`` for each figure. Nothing is kept."""
    threads = threads or thread_counts()[-1]
    with team(threads):
        reads = {size: read(size, seconds)[0] for size in sizes}
        peaks = {kind: peak(kind, seconds) for kind in KINDS}
    return Limits(hardware.probe().cpu, threads, datetime.now(UTC).isoformat(timespec="seconds"), reads, peaks)


def working_sets(largest: int = LARGEST) -> list[int]:
    """512 KiB, 1 MiB ... up to ``largest`` bytes."""
    return [size for size in (1 << power for power in range(19, 48)) if size < largest] + [largest]


def steps(threads: Sequence[int], sizes: Sequence[int]) -> int:
    return len(threads) * (len(sizes) + len(KINDS))


def thread_counts() -> list[int]:
    """1, 2, 4 ... up to all cores of this process."""
    cores = hardware.probe().cores
    return sorted({min(1 << power, cores) for power in range(cores.bit_length() + 1)})


def best(run: Callable[[], Any], seconds: float) -> float:
    """Seconds of the fastest run in ``seconds`` (at least two): what others take from a shared machine is no limit."""
    run()
    fastest, until = float("inf"), time.perf_counter() + seconds
    while fastest == float("inf") or time.perf_counter() < until:
        began = time.perf_counter()
        run()
        fastest = min(fastest, time.perf_counter() - began)
    return fastest


@contextmanager
def team(threads: int) -> Iterator[None]:
    """``threads`` threads for torch and for the library while the block runs."""
    from tuili.base.threads import let_waiting_threads_sleep

    let_waiting_threads_sleep()
    import torch

    from tuili.ops import cpu

    before, own = torch.get_num_threads(), cpu.describe().threads
    torch.set_num_threads(threads)
    cpu.set_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        cpu.set_threads(max(1, own))


def _library() -> Any:
    """The C++ library's probes; None where it was not built or has none."""
    from tuili.ops import cpu

    return cpu if cpu.describe().built and hasattr(cpu, "read_bandwidth") else None


# --------------------------------------------------------------------------------------------------- bytes per second


def read(size: int, seconds: float) -> tuple[float, str]:
    """Bytes per second read from ``size`` bytes again and again, and by what."""
    import torch

    if (library := _library()) is not None:
        return library.read_bandwidth(size, seconds), "tuili"
    data = torch.ones(size // 4)
    return data.nbytes / best(lambda: data.sum(), seconds), "torch.sum"


def write(size: int, seconds: float) -> float:
    """Bytes per second that are written (``torch.fill_``)."""
    import torch

    data = torch.empty(size // 4)
    return data.nbytes / best(lambda: data.fill_(1.0), seconds)


def copy(size: int, seconds: float) -> float:
    """Bytes per second that are read plus those that are written when half of ``size`` is copied to the other half."""
    import torch

    source, target = torch.ones(2, size // 8)
    return 2 * source.nbytes / best(lambda: target.copy_(source), seconds)


def caches() -> dict[str, dict[str, int]]:
    """``{"L2": {"bytes": ..., "cores": cores that share one}}`` of data caches; empty where the system does not say."""
    found: dict[str, dict[str, int]] = {}
    for index in sorted(CACHES.glob("index*")):
        try:
            kind, level, size, shared = (
                (index / name).read_text().strip() for name in ("type", "level", "size", "shared_cpu_list")
            )
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}"] = {"bytes": int(size.removesuffix("K")) << 10, "cores": _count(shared)}
    return found


def _count(cpus: str) -> int:
    """How many processors "0-3,8" are."""
    spans = [part.split("-") for part in cpus.split(",")]
    return sum(int(span[-1]) - int(span[0]) + 1 for span in spans)


def level_of(size: int, threads: int, found: dict[str, dict[str, int]]) -> str:
    """The smallest cache that holds ``size`` bytes spread over ``threads`` cores, or "memory"."""
    for level, cache in sorted(found.items()):
        if size <= cache["bytes"] * -(-threads // cache["cores"]):
            return level
    return "memory" if found else "unknown"


# ---------------------------------------------------------------------------------------------- operations per second


def peak(kind: str, seconds: float) -> float:
    """Operations per second of ``kind``: the better of all that ``multiply`` measures."""
    return max(float(found["per_second"]) for found in multiply(kind, seconds))


def multiply(kind: str, seconds: float) -> list[dict[str, Any]]:
    """Operations per second of ``kind``: in registers where the library can, and of torch's matrix product, which for
    weights of 4 bits is that of bytes."""
    measured = [_product(kind, seconds)]
    if (library := _library()) is not None:
        measured.insert(0, {"per_second": library.peak(kind, seconds), "how": "tuili"})
    return measured


def _product(kind: str, seconds: float) -> dict[str, Any]:
    """Torch's best over ``SIDES``, as far as one product of the next takes no more than ``seconds``: where torch has no
    fast path it is slower by orders of magnitude."""
    import torch

    rate, name = 0.0, "torch._int_mm" if kind.startswith("int") else "torch.mm"
    multiplied = torch._int_mm if kind.startswith("int") else torch.mm
    for side in SIDES:
        values = torch.randint(-128, 128, (side, side), dtype=torch.int8)
        matrix = values if kind.startswith("int") else values.to(getattr(torch, kind))
        took = best(lambda matrix=matrix: multiplied(matrix, matrix), seconds / len(SIDES))  # type: ignore[misc]
        rate = max(rate, 2 * side**3 / took)
        if 8 * took > seconds:
            break
    return {"per_second": rate, "how": name}
