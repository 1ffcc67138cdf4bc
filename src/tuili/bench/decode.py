"""Decode speed of an engine with the machine's read bandwidth probed beside every run: what a prediction is held to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tuili.bench import machine, offline
from tuili.bench.arms import vocabulary
from tuili.bench.statistics import median
from tuili.bench.workload import Span, fixed_random

if TYPE_CHECKING:
    from tuili.engine.text import TextEngine


def decode_speed(
    engine: TextEngine,
    concurrency: int,
    prompt: int,
    output: int,
    repeats: int,
    working_set: int,
    kind: str,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Tokens per second of ``concurrency`` requests of ``prompt`` + ``output`` tokens while all decode: medians over
    ``repeats`` runs. Before each, as many threads as compute probe the bandwidth at ``working_set`` bytes and the peak
    of products of ``kind``."""
    assert engine.config.threads is not None
    work = fixed_random(concurrency, Span(prompt, prompt), Span(output, output), vocab=vocabulary(engine))
    tpots, reads, peaks, how = [], [], [], ""
    for repeat in range(repeats + 1):
        with machine.team(engine.config.threads):
            rate, how = machine.read(working_set, 0.2)
            peak = machine.peak(kind, 0.05)
        outcome = offline.latency(engine, work, warmups=0, repeats=1)
        if repeat:  # the first run warms up
            reads.append(rate)
            peaks.append(peak)
            tpots.append(outcome["tpot_ms"]["median"])
        tick()
    return {
        "concurrency": concurrency,
        "prompt": prompt,
        "output": output,
        "tpot_ms": tpots,
        "read_per_second": reads,
        "probe": how,
        "bandwidth": median(reads),
        "peak": median(peaks),
        "tokens_per_second": 1000 * concurrency / median(tpots),
    }
