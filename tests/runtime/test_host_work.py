"""Law 13: what the host does for a step depends on the batch, never on the context. Counted in calls, not in time."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from equality import LONGEST, VOCAB, engine, request

import tuili

#: The control plane and the runner; ops and layers stand for the device.
HOST = tuple(str(Path(tuili.__file__).parent / part) for part in ("core", "runtime", "executors", "engine"))


def count_calls(work: Any) -> Counter[str]:
    """Python and C calls made from the host's own functions while ``work()`` runs."""
    calls: Counter[str] = Counter()

    def watch(frame: FrameType, event: str, arg: Any) -> None:
        if event in ("call", "c_call") and frame.f_code.co_filename.startswith(HOST):
            calls[f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}:{event}"] += 1

    sys.setprofile(watch)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def decode_step(rows: int, context: int) -> Counter[str]:
    """Calls of one decode step of ``rows`` requests that are ``context`` long and cross no block boundary."""
    scheduler, executor = engine("llama-f32", budget=4096, blocks=2000, rows=rows, reuse=True)
    for i in range(rows):
        prompt = tuple((7 * i + j) % VOCAB for j in range(context))
        scheduler.add(request(str(i), prompt, max_tokens=12))

    def step() -> None:
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.update(plan, executor.execute(plan).result())

    step()
    step()
    return count_calls(step)


@pytest.mark.parametrize("rows", [1, 6])
def test_host_work_does_not_grow_with_context(rows: int) -> None:
    short, long = decode_step(rows, 17), decode_step(rows, LONGEST - 31)
    assert short == long
    assert sum(short.values()) > 20


def test_host_work_grows_at_most_linearly_with_the_batch() -> None:
    one, six, twelve = (sum(decode_step(rows, 17).values()) for rows in (1, 6, 12))
    per_row = (six - one) / 5
    assert twelve <= one + 11 * per_row + 5
