"""The loop: plans go down, results come back, updates go out. It knows nothing of text, threads or tensors.

How it ends. A request that fails alone comes back as an update with ``finish == ERROR``. Anything else that goes wrong
in a step (the executor raises, the scheduler's books break) kills the engine: ``step`` raises EngineDead, now and from
then on, and so does ``add``. Whoever drives the engine (a client) hands that error to everyone whose request was
accepted; the server answers 503 and its process exits non-zero, since a device after a failed step cannot be trusted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace

from tuili.base.clock import Clock
from tuili.base.errors import ConfigError, EngineDead
from tuili.base.log import get
from tuili.core.executor import Executor
from tuili.core.plan import StepPlan, StepResult, StepStats
from tuili.core.request import Request, Update
from tuili.core.scheduler import Scheduler

log = get(__name__)
#: Gets each step's plan, result and completed record.
Listener = Callable[[StepPlan, StepResult, StepStats], None]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The engine at a glance. Blocks of KV; prefix look-ups in tokens; counts since the start."""

    num_running: int
    num_waiting: int
    kv_usage: float
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    kv_blocks_used: int
    kv_blocks_total: int
    steps: int


@dataclass(frozen=True, slots=True)
class _Flight:
    plan: StepPlan
    future: Future[StepResult]
    schedule_seconds: float


def describe_error(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


class Engine:
    """Drives ``scheduler`` and ``executor``. Not safe for several threads: one thread owns it (see ``client.py``).

    ``depth`` is the number of plans in flight: 1 is lock-step, 2 lets the host plan while the device computes.
    ``listeners`` get the plan, the result and the completed record of each step, in the engine's thread, after its
    updates were made.
    ``explain`` puts in words what it died of.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        clock: Clock,
        depth: int = 1,
        explain: Callable[[Exception], str] = describe_error,
    ):
        if depth < 1:
            raise ConfigError(f"the engine's depth must be at least 1, got {depth}")
        self.scheduler = scheduler
        self.executor = executor
        self.clock = clock
        self.depth = depth
        self.explain = explain
        self.listeners: list[Listener] = []
        self.dead: EngineDead | None = None
        self.steps = 0
        self._flights: deque[_Flight] = deque()

    @property
    def has_work(self) -> bool:
        return self.dead is None and (bool(self._flights) or self.scheduler.has_work)

    def add(self, request: Request) -> None:
        """Accept ``request``. Raises RequestError, OverloadedError, EngineDead."""
        if self.dead is not None:
            raise self.dead
        self.scheduler.add(request)

    def abort(self, id: str) -> Update | None:
        """End ``id`` now; its last update, or None when it is not here (any more)."""
        return None if self.dead is not None else self.scheduler.abort(id)

    def holds(self, id: str) -> bool:
        """Whether ``id`` has blocks, waits for them, or is mentioned by a plan in flight."""
        return self.dead is None and self.scheduler.holds(id)

    def step(self) -> list[Update]:
        """Bring the oldest step in flight to its end: what it changed. Empty when there is nothing to do."""
        if self.dead is not None:
            raise self.dead
        try:
            return self._step()
        except Exception as error:  # whatever it was, the books and the device may disagree now
            self.dead = EngineDead(f"the engine died in step {self.steps}: {self.explain(error)}")
            raise self.dead from error

    def _step(self) -> list[Update]:
        while len(self._flights) < self.depth and (flight := self._launch()) is not None:
            self._flights.append(flight)
        if not self._flights:
            if self.scheduler.has_work:
                raise RuntimeError("there are requests, and no plan can be made for them")
            return []
        flight = self._flights.popleft()
        result = flight.future.result()
        began = self.clock.now()
        stats = self.scheduler.stats(flight.plan)
        updates = self.scheduler.update(flight.plan, result)
        self.steps += 1
        stats = replace(
            stats,
            device_seconds=result.stats.device_seconds,
            schedule_seconds=flight.schedule_seconds,
            update_seconds=self.clock.now() - began,
        )
        self._tell(flight.plan, result, stats)
        return updates

    def _launch(self) -> _Flight | None:
        began = self.clock.now()
        plan = self.scheduler.schedule()
        if plan is None:
            return None
        seconds = self.clock.now() - began
        return _Flight(plan, self.executor.execute(plan), seconds)

    def _tell(self, plan: StepPlan, result: StepResult, stats: StepStats) -> None:
        for listener in self.listeners:
            try:
                listener(plan, result, stats)
            except Exception:  # a broken metric must not end anyone's request
                log.exception("a listener failed at step %d", stats.step)

    def snapshot(self) -> Snapshot:
        """May be called from any thread; the numbers may then be of two neighbouring steps."""
        scheduler, cache = self.scheduler, self.scheduler.cache
        return Snapshot(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            kv_usage=cache.usage,
            prefix_queries=cache.queries,
            prefix_hits=cache.hits,
            preemptions=scheduler.preempted,
            kv_blocks_used=cache.num_used,
            kv_blocks_total=cache.num_blocks,
            steps=self.steps,
        )

    def check_integrity(self) -> None:
        """For idle moments: EngineDead when the scheduler's books disagree, since what runs next would be wrong."""
        try:
            self.scheduler.check_integrity()
        except RuntimeError as error:
            self.dead = EngineDead(f"the engine's books disagree after step {self.steps}: {error}")
            raise self.dead from error

    def close(self) -> None:
        """Free the device. Steps in flight are waited for, so that nothing writes to memory that was given back."""
        while self._flights:
            self._flights.popleft().future.exception()
        self.executor.close()
