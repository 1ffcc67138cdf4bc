"""What a machine reaches, measured once and kept in a file: bytes per second by working set, operations per second by
kind; and the roofline over them. No torch: planners read the limits of machines that are elsewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tuili.base.errors import ConfigError

#: Where ``tuili bench machine`` writes and everybody else looks.
PATH = Path.home() / ".cache" / "tuili" / "machine.json"


@dataclass(frozen=True)
class Limits:
    """Of ``threads`` threads of ``cpu``. ``reads``: bytes per second by bytes of working set; ``peaks``: operations per
    second by kind (float32, bfloat16, int8, int4; a multiplication and an addition are two)."""

    cpu: str
    threads: int
    date: str
    reads: Mapping[int, float]
    peaks: Mapping[str, float]

    def bandwidth(self, working_set: int) -> float:
        """Bytes per second at which ``working_set`` bytes are read again and again; between measured sizes on the line
        over the logarithm of the size."""
        sizes = sorted(self.reads)
        if working_set <= sizes[0]:
            return self.reads[sizes[0]]
        for below, above in pairwise(sizes):
            if working_set <= above:
                part = math.log(working_set / below) / math.log(above / below)
                return self.reads[below] + part * (self.reads[above] - self.reads[below])
        return self.reads[sizes[-1]]

    def peak(self, kind: str) -> float:
        """Operations per second of ``kind``; of int4, where it was not measured, int8's."""
        return self.peaks[kind if kind in self.peaks or kind != "int4" else "int8"]

    @property
    def memory_bandwidth(self) -> float:
        """Bytes per second from memory: of the largest working set."""
        return self.reads[max(self.reads)]


def attainable(intensity: float, bandwidth: float, peak: float) -> float:
    """Operations per second under the roofline, at ``intensity`` operations per byte (Williams et al. 2009)."""
    return min(peak, intensity * bandwidth)


def bound(intensity: float, bandwidth: float, peak: float) -> str:
    """What holds a kernel of ``intensity`` operations per byte back: "memory" or "compute"."""
    return "memory" if intensity * bandwidth < peak else "compute"


def from_result(result: Mapping[str, Any], threads: int | None = None) -> Limits:
    """The limits in a result of ``tuili bench machine`` for ``threads`` threads (None: the most measured)."""
    counts = sorted({read["threads"] for read in result["reads"]})
    threads = counts[-1] if threads is None else threads
    if threads not in counts:
        raise ConfigError(f"threads={threads} was not measured; measured: {counts}. Run: tuili bench machine")
    peaks: dict[str, float] = {}
    for peak in result["peaks"]:
        if peak["threads"] == threads:
            peaks[peak["kind"]] = max(peak["per_second"], peaks.get(peak["kind"], 0.0))
    reads = {read["bytes"]: read["per_second"] for read in result["reads"] if read["threads"] == threads}
    origin = result["provenance"]
    return Limits(origin["machine"]["cpu"], threads, origin["date"], reads, peaks)


def load(path: Path | None = None, threads: int | None = None) -> Limits:
    """The limits kept in ``path`` (None: ``PATH``). ConfigError where there are none, or none that can be read."""
    path = path or PATH
    try:
        return from_result(json.loads(path.read_text()), threads)
    except FileNotFoundError:
        raise ConfigError(f"no measured limits in {path}; measure this machine: tuili bench machine") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{path} holds no measured limits ({error!r}); measure again: tuili bench machine") from error
