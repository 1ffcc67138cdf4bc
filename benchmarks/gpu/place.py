"""Where a piece of gpu-check runs and what it has found so far, kept in a file that survives whatever happens to it."""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Entry = dict[str, Any]
#: What an entry says of itself. ``running`` in a file that nobody writes any more: the process died in it.
DONE, FAILED, RUNNING, LEFT_OUT = "done", "failed", "running", "left out"


class Poisoned(RuntimeError):
    """The CUDA context is lost: nothing more can be computed in this process."""


class LeftOut(Exception):
    """Not measured, and no failure: it would not fit."""


@dataclass
class Place:
    """``device``, sizes (``tiny``: to show on a CPU that the pieces work) and the ``path`` of the piece's entries.

    What is in the file already is not done again, so that a piece can be started anew after a crash. ``deadline``, on
    the clock of ``time.monotonic``, is when nothing more begins.
    """

    device: str
    tiny: bool
    path: Path
    deadline: float = float("inf")
    entries: dict[str, Entry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            self.entries = json.loads(self.path.read_text())
        for entry in self.entries.values():
            if entry["status"] == RUNNING:
                entry |= {"status": FAILED, "error": "the process died or was stopped while it ran"}

    def attempt(self, name: str, call: Callable[[], Entry | None]) -> None:
        """``call`` and note what it returns under ``name``; what it raises, too, and go on. Poisoned if the card will
        compute no more."""
        if name in self.entries:
            return
        if time.monotonic() > self.deadline:
            self._note(name, {"status": LEFT_OUT, "why": "no time was left"})
            return
        self._note(name, {"status": RUNNING})
        began = time.perf_counter()
        try:
            found = {"status": DONE, **(call() or {})}
        except LeftOut as why:
            found = {"status": LEFT_OUT, "why": str(why)}
        except Exception as error:
            found = {"status": FAILED, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        self._note(name, {**found, "seconds": round(time.perf_counter() - began, 2)})
        if self.device == "cuda" and poisoned():
            raise Poisoned(name)

    def _note(self, name: str, entry: Entry) -> None:
        self.entries[name] = entry
        write(self.path, self.entries)


def write(path: Path, data: Any) -> None:
    """JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    part.replace(path)


def poisoned() -> bool:
    """Whether the CUDA context is lost, as after an illegal address."""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except Exception:
        return True
    return False


def seconds(call: Callable[[], Any], device: str) -> float:
    """Median time of ``call``: on a card by events, over fresh caches, without the host's part."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(call, warmup=10, rep=50, return_mode="median") / 1000
    times = []
    for _ in range(3):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
