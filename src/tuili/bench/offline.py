"""The engine in this process under load: throughput of a workload, latency of a batch, and what the host costs per
step.

Takes any ``TextEngine``; imports no torch (``tuili.engine.build`` does, when a caller builds one).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any

from tuili.base.errors import TuiliError
from tuili.bench.load import LoadRun, Record, offer
from tuili.bench.report import summarize
from tuili.bench.statistics import ci95, median, spread
from tuili.bench.workload import Item, Workload
from tuili.core.params import SamplingParams
from tuili.core.plan import StepPlan, StepResult, StepStats

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tuili.engine.text import TextEngine

#: Numbers the runs of this process, so that each has request ids and a cache salt of its own.
_runs = count()


@dataclass(slots=True)
class EngineSender:
    """Sends items to an engine; ``all_sent`` is called when ``expected`` of them are in its queue."""

    engine: TextEngine
    salt: str
    expected: int = 0
    all_sent: Callable[[], None] = lambda: None
    _sent: int = field(default=0, init=False)

    async def __call__(self, item: Item, record: Record, origin: float) -> None:
        params = SamplingParams(max_tokens=item.max_tokens, temperature=0.0, ignore_eos=True)
        self._sent += 1
        if self._sent == self.expected:
            asyncio.get_running_loop().call_soon(self.all_sent)
        record.start = time.perf_counter() - origin
        name = f"bench-{self.salt}-{record.index}"
        stream = self.engine.generate(item.tokens, params, request_id=name, cache_salt=self.salt)
        async for delta in stream:
            if delta.token_ids or delta.text:
                record.piece(time.perf_counter() - origin)
            if delta.usage is not None:
                record.input_tokens = delta.usage.prompt_tokens
                record.output_tokens = delta.usage.completion_tokens
                record.cached_tokens = delta.usage.cached_tokens
                record.finish_reason = delta.finish_reason


class Hold:
    """Stops the engine's thread after a step until ``release`` is called (or ten seconds have gone by).

    ``step`` is the number of that step, None before it.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self._released = threading.Event()

    def __call__(self, plan: StepPlan, result: StepResult, stats: StepStats) -> None:
        if self.step is None:
            self.step = stats.step
        self._released.wait(10.0)

    def release(self) -> None:
        self._released.set()


@asynccontextmanager
async def held(engine: TextEngine) -> AsyncIterator[Hold]:
    """Hold the engine between two steps, so that a whole workload is waiting when the next one is planned.

    Without this static batching would start with a batch of one and the comparison would be unfair to it.
    """
    hold = Hold()
    engine.on_step.append(hold)
    plug = asyncio.ensure_future(_one_step(engine))
    try:
        while hold.step is None and not plug.done():
            await asyncio.sleep(0.0005)
        yield hold
        await plug
    finally:
        hold.release()
        engine.on_step.remove(hold)


async def _one_step(engine: TextEngine) -> None:
    """A request that takes one step, to stop the engine in."""
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    name = f"bench-hold-{next(_runs)}"
    async for _ in engine.generate((1,), params, request_id=name, cache_salt=name):
        pass


@dataclass(frozen=True, slots=True)
class TimedStep:
    """A step's record and when it began and ended, seconds on the engine's clock. ``end`` is when its listeners were
    told."""

    stats: StepStats
    end: float

    @property
    def begin(self) -> float:
        """The scheduler stamps ``started`` when the plan is made, at the end of scheduling."""
        return self.stats.started - self.stats.schedule_seconds


@contextmanager
def recorded(engine: TextEngine) -> Iterator[list[TimedStep]]:
    """All steps of the engine while the block runs."""
    steps: list[TimedStep] = []

    def listen(plan: StepPlan, result: StepResult, stats: StepStats) -> None:
        steps.append(TimedStep(stats, engine.clock.now()))

    engine.on_step.append(listen)
    try:
        yield steps
    finally:
        engine.on_step.remove(listen)


async def run_all(
    engine: TextEngine, workload: Workload, done: Callable[[Record], None]
) -> tuple[LoadRun, list[TimedStep]]:
    """Everything in the queue at once, as an offline batch is; the engine's ``max_num_seqs`` says how many run
    together.

    The prefix cache starts empty: every run has its own salt.
    """
    salt = f"run{next(_runs)}"
    async with held(engine) as hold:
        sender = EngineSender(engine, salt, len(workload.items), hold.release)
        with recorded(engine) as steps:
            run = await offer(sender, workload.items, done=done)
    return run, [step for step in steps if step.stats.step != hold.step]


def throughput(
    engine: TextEngine, workload: Workload, done: Callable[[Record], None] = lambda r: None
) -> dict[str, Any]:
    """Figures of one run of an offline batch: those of ``bench serve``, and where the time of the steps went.

    TuiliError when a request fails: a batch with holes is no measurement.
    """
    run, steps = asyncio.run(run_all(engine, workload, done))
    _check(run)
    return summarize(run) | {"steps": step_times(steps)}


def _check(run: LoadRun) -> None:
    failed = [record.error for record in run.records if record.error is not None]
    if failed:
        raise TuiliError(f"{len(failed)} of {len(run.records)} requests failed, the first with: {failed[0]}")


def step_times(steps: Sequence[TimedStep]) -> dict[str, Any]:
    """Where the seconds between the first step's begin and the last one's end went.

    ``schedule``, ``device`` and ``update`` are what the engine measured; ``dispatch`` is the rest of a step;
    ``between`` is from one step to the next (updates to streams, new requests, other threads).
    """
    parts = {
        "schedule": sum(step.stats.schedule_seconds for step in steps),
        "device": sum(step.stats.device_seconds for step in steps),
        "update": sum(step.stats.update_seconds for step in steps),
        "between": sum(after.begin - step.end for step, after in pairwise(steps)),
    }
    wall = steps[-1].end - steps[0].begin if steps else 0.0
    return {
        "count": len(steps),
        "seconds": {**parts, "dispatch": wall - sum(parts.values()), "wall": wall},
        "tokens": sum(step.stats.num_tokens for step in steps),
        "padding_tokens": sum(step.stats.padding_tokens for step in steps),
        "preempted": sum(step.stats.preempted for step in steps),
        "host_ms_per_decode_step": host_overhead(steps),
    }


def host_overhead(steps: Sequence[TimedStep]) -> dict[str, dict[str, float]]:
    """Medians in milliseconds of host time per decode step, by number of requests in the step (as text: JSON keys).

    Steps count when they and the next one decode the same number of requests and prefill nothing. ``total`` is from
    this step's begin to the next one's, less the device's time; ``own`` is schedule + update, which other threads
    hardly touch.
    """
    total: dict[int, list[float]] = {}
    own: dict[int, list[float]] = {}
    for step, after in pairwise(steps):
        this, next_ = step.stats, after.stats
        same = this.num_requests == next_.num_requests and next_.step == this.step + 1
        if same and not this.num_prefill_tokens and not next_.num_prefill_tokens:
            total.setdefault(this.num_requests, []).append(1000 * (after.begin - step.begin - this.device_seconds))
            own.setdefault(this.num_requests, []).append(1000 * (this.schedule_seconds + this.update_seconds))
    return {
        str(rows): {"steps": len(values), "total": median(values), "own": median(own[rows])}
        for rows, values in sorted(total.items())
    }


def latency(
    engine: TextEngine,
    workload: Workload,
    *,
    warmups: int,
    repeats: int,
    done: Callable[[Record], None] = lambda r: None,
) -> dict[str, Any]:
    """Times of one batch, run ``repeats`` times after ``warmups``: until all its requests ended, milliseconds.

    ``steps`` are those of the run with the median time.
    """
    runs: list[tuple[LoadRun, list[TimedStep]]] = []
    for index in range(warmups + repeats):
        outcome = asyncio.run(run_all(engine, workload, done))
        _check(outcome[0])
        if index >= warmups:
            runs.append(outcome)
    batch = [1000 * run.duration for run, _ in runs]
    records = [record for run, _ in runs for record in run.records]
    return {
        "batch_size": len(workload.items),
        "repeats": repeats,
        "latency_ms": spread(batch) | {"ci95_mean": ci95(batch)},
        "ttft_ms": spread([1000 * record.ttft for record in records]),
        "tpot_ms": spread([1000 * record.tpot for record in records if record.tpot is not None]),
        "latencies_ms": batch,
        "steps": step_times(sorted(runs, key=lambda outcome: outcome[0].duration)[len(runs) // 2][1]),
    }
