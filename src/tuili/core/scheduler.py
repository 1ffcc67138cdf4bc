"""Requests into plans, results into state: one token budget, no phases (DESIGN.md 2).

``schedule`` gives every running request, best rank first, what it needs to catch up, then admits waiting ones;
``update`` takes the result of the oldest plan in flight. Calling ``schedule`` again before ``update`` is depth 2.
Requests move waiting -> running -> done, and back to waiting when preempted; blocks and rows go back only when no plan
in flight mentions the request (law 3).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tuili.base.clock import Clock
from tuili.base.errors import ConfigError, OverloadedError, RequestError
from tuili.core.cache import KVCacheManager
from tuili.core.entry import Entry, State, broken_by, check, make_update, stop
from tuili.core.executor import Capacity
from tuili.core.plan import Chunk, StepPlan, StepResult, StepStats
from tuili.core.policies import Policy
from tuili.core.request import FinishReason, Request, Update
from tuili.core.waiting import WaitingQueue


@dataclass(slots=True)
class _PlanDraft:
    """A plan in the making."""

    budget: int
    chunks: list[Chunk] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    #: Running entries that sit this step out, so that blocks can be had.
    held: set[Entry] = field(default_factory=set)
    preempted: int = 0


class Scheduler:
    """Turns requests into plans for an executor of ``capacity``.

    ``max_num_batched_tokens`` is the token budget of a step, ``max_num_seqs`` the number of rows; every running row
    gets at least one token per step, so the budget must be at least the rows (ConfigError). Without chunked prefill a
    prompt is computed whole: one longer than what is left of the budget goes over it, as the only one of its step.
    ``max_queued`` requests may wait beyond those that have a row, or soon will (OverloadedError from ``add``).
    ``reserve_kv`` gives a request all the blocks that it may need when it is admitted, so that it is never preempted
    for them.
    """

    def __init__(
        self,
        capacity: Capacity,
        policy: Policy,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        enable_prefix_caching: bool,
        reserve_kv: bool = False,
        enable_chunked_prefill: bool = True,
        clock: Clock,
        max_queued: int | None = None,
    ):
        if not 1 <= max_num_seqs <= max_num_batched_tokens:
            raise ConfigError(
                f"max_num_batched_tokens {max_num_batched_tokens} must be at least max_num_seqs {max_num_seqs}, and "
                "that at least 1: every running request computes a token per step. Raise the first or lower the second."
            )
        self.capacity = capacity
        self.policy = policy
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.reserve_kv = reserve_kv
        self.enable_chunked_prefill = enable_chunked_prefill
        self.max_queued = max_queued
        self.cache = KVCacheManager(capacity.num_blocks, capacity.block_size, enable_prefix_caching)
        self.preempted = 0  # preemptions since the start
        self._clock = clock
        self._requests: dict[str, Request] = {}
        self._entries: dict[str, Entry] = {}  # also those that are done but in flight
        self._waiting: WaitingQueue[Entry] = WaitingQueue()
        self._running: list[Entry] = []  # best rank first
        self._newest: Entry | None = None  # the last that was added
        self._rows = 0  # running, or done and in flight
        self._dropped: list[str] = []
        self._in_flight: dict[int, list[Entry]] = {}
        self._overdue: list[Update] = []  # last updates of requests that failed in schedule()
        self._stats: dict[int, StepStats] = {}
        self._step = 0
        self._arrivals = 0
        self._batch_rows = 0
        self._blocked: tuple[Entry, int] | None = None  # head of the queue, and the free blocks that were too few

    # ------------------------------------------------------------------------------------------------ what it holds

    @property
    def requests(self) -> Mapping[str, Request]:
        """Accepted and not finished, by id."""
        return self._requests

    def holds(self, id: str) -> bool:
        """Accepted, and not finished or still in flight."""
        return id in self._entries

    @property
    def has_work(self) -> bool:
        """Anything waiting, running, in flight or yet to be told."""
        return bool(self._entries or self._overdue)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def stats(self, plan: StepPlan) -> StepStats:
        """The scheduler's part of the step's record, as of ``schedule``; known until the ``update`` of a later plan."""
        return self._stats[plan.step]

    def check_integrity(self) -> None:
        """Raises RuntimeError when books disagree: leaked blocks, rows or runner state. O(pool), for idle moments."""
        self.cache.check_integrity()
        held = sum(bool(entry.table.blocks) for entry in self._entries.values())
        if held != self._rows or held != self.cache.num_tables:
            raise RuntimeError(f"{self._rows} rows, {held} requests with blocks, {self.cache.num_tables} block tables")
        if not self._entries and self.cache.num_used:
            raise RuntimeError(f"{self.cache.num_used} blocks in use by nobody")

    # --------------------------------------------------------------------------------------------------- in and out

    def add(self, request: Request) -> None:
        """Accept ``request`` or raise RequestError (it can never run here) or OverloadedError (not now)."""
        if request.id in self._entries:
            raise RequestError(f"request id {request.id!r} is in use; choose another", "request_id")
        twin = self._twin(request)
        limit = check(request, self.capacity, known=twin is not None)
        if self.max_queued is not None and len(self._requests) >= self.max_num_seqs + self.max_queued:
            raise OverloadedError(
                f"{self.num_running} requests are running and {self.num_waiting} waiting, the most allowed; try again "
                "later"
            )
        table = self.cache.open(request.tokens, request.salt, twin.table.digests if twin else ())
        request.timing.queued = self._clock.now()
        entry = Entry(request, (self.policy.key(request), self._arrivals), table, limit)
        self._arrivals += 1
        self._newest = self._entries[request.id] = entry
        self._requests[request.id] = request
        self._waiting.push(entry)

    def _twin(self, request: Request) -> Entry | None:
        """The entry added last, where its ids are those of ``request``: of the choices of one call, long as their
        prompt may be, only the first is looked at in full."""
        last = self._newest
        alike = last is not None and last.request.salt == request.salt and last.request.tokens == request.tokens
        return last if alike else None

    def abort(self, id: str) -> Update | None:
        """End ``id`` now; its last update, or None when it is not here. Blocks go when no plan in flight needs them."""
        entry = self._entries.get(id)
        if entry is None or entry.state is State.DONE:
            return None
        return self._finish(entry, FinishReason.ABORT)

    def reset_prefix_cache(self) -> None:
        """Forget all cached content, for example when the weights change."""
        self.cache.reset()

    # --------------------------------------------------------------------------------------------- requests to plan

    def schedule(self) -> StepPlan | None:
        """The next plan, or None when nothing can be computed before an ``update`` (or an ``add``).

        A plan without chunks only asks for its ``update``: a request ended here, and nothing else is going on.
        """
        step = _PlanDraft(self.max_num_batched_tokens)
        if not self._running:
            self._batch_rows = 0
        may_join = bool(self._waiting) and self.policy.joins([entry.request for entry in self._running])
        self._continue(step)
        if may_join and not step.held and not step.preempted:  # blocks that were just fought for are not for newcomers
            self._admit(step)
        if not step.chunks and (self._in_flight or not self._overdue):
            return None
        plan = StepPlan(self._step, tuple(step.chunks), tuple(self._dropped))
        self._step += 1
        self._dropped.clear()
        self._in_flight[plan.step] = step.entries
        self._stats[plan.step] = self._measure(plan, step)
        return plan

    def _continue(self, step: _PlanDraft) -> None:
        """A share for every running request. Each gets one token before any gets more, so a long prompt of a better
        rank cannot stop the others from decoding."""
        order = self._running.copy()
        for index, entry in enumerate(order):
            if entry.state is not State.RUNNING or entry in step.held:
                continue
            try:
                self._share(step, order, index)
            except Exception as error:
                self._fail(entry, error)

    def _share(self, step: _PlanDraft, order: list[Entry], index: int) -> None:
        entry = order[index]
        count = self._count(entry, step.budget - (len(order) - index - 1))
        if count < 1:
            return
        blocks = self._make_room(step, order, index, entry.request.computed + count)
        if blocks is None:
            step.held.add(entry)
        else:
            self._add_chunk(step, entry, count, blocks)

    def _count(self, entry: Entry, budget: int) -> int:
        """How many positions ``entry`` computes with ``budget``; drafts that do not fit are cut."""
        request, length = entry.request, entry.length
        if entry.poisoned or entry.guesses or length >= entry.limit:
            return 0
        if request.draft:
            room = min(budget - (length - request.computed), entry.limit - length - 1)
            del request.draft[max(0, room) :]
        need = length + len(request.draft) - request.computed
        return need if need < budget else budget

    def _make_room(self, step: _PlanDraft, order: list[Entry], index: int, positions: int) -> tuple[int, ...] | None:
        """Blocks for ``positions`` of ``order[index]``, if need be from those after it; None if it has to wait a step.

        The lowest rank never preempts itself: it keeps what it has and waits, until a better one needs it.
        """
        while (blocks := self.cache.grow(order[index].table, positions)) is None:
            candidates = [other for other in order[index + 1 :] if other.state is State.RUNNING]
            if not candidates:
                return None
            victim = self._entries[self.policy.victim([other.request for other in candidates]).id]
            if victim.in_flight:
                step.held.add(victim)
                return None
            self._preempt(victim)
            step.preempted += 1
        return blocks

    def _admit(self, step: _PlanDraft) -> None:
        """Waiting requests in the order of rank; the first that does not fit blocks those behind it."""
        before = len(step.chunks)
        while step.budget > 0 and self._rows < self.max_num_seqs and (entry := self._waiting.peek()):
            if self._blocked and self._blocked[0] is entry and self.cache.num_free <= self._blocked[1]:
                return
            try:
                if not self._admit_next(step, entry, alone=len(step.chunks) == before):
                    return
            except Exception as error:
                self._fail(entry, error)

    def _admit_next(self, step: _PlanDraft, entry: Entry, alone: bool) -> bool:
        """Start the first of the queue; False where the step has no room. ``alone``: it admitted nobody else so far."""
        request = entry.request
        reads = request.params.prompt_logprobs is None  # their hidden states are needed, not only their KV
        found = self.cache.lookup(entry.table, request.tokens) if reads else []
        reused = len(found) * self.cache.block_size
        count = len(request.tokens) - reused
        if self.enable_chunked_prefill:
            count = min(count, step.budget)
        elif count > step.budget and not alone:
            return False
        if not self.cache.admit(entry.table, found, entry.limit if self.reserve_kv else len(request.tokens)):
            self._blocked = (entry, self.cache.num_free)
            return False
        self._start(entry, reused)
        if reads and self.cache.reuse and not request.preemptions:
            self.cache.count_query(len(request.tokens), reused)
        self._add_chunk(step, entry, count, tuple(entry.table.blocks), tuple(request.tokens[:reused]))
        return True

    def _fail(self, entry: Entry, error: Exception) -> None:
        """Something went wrong with one request's books: it ends (law 6), and the next ``update`` says so (law 7)."""
        if entry.state is State.WAITING:  # it may have been given blocks already
            self.cache.release(entry.table)
        why = f"{type(error).__name__} in the scheduler: {error}"
        self._overdue.append(self._finish(entry, FinishReason.ERROR, error=why))

    def _start(self, entry: Entry, reused: int) -> None:
        request = entry.request
        self._waiting.pop()
        self._blocked = None
        entry.state = State.RUNNING
        insort(self._running, entry, key=lambda e: e.rank)
        self._rows += 1
        request.computed = reused
        if request.timing.scheduled is None:
            request.timing.scheduled = self._clock.now()
            request.cached = min(reused, request.prompt_len)

    def _add_chunk(
        self, step: _PlanDraft, entry: Entry, count: int, blocks: tuple[int, ...], history: tuple[int, ...] = ()
    ) -> None:
        request = entry.request
        start, end = request.computed, request.computed + count
        sample = end == entry.length + len(request.draft)
        drafts = len(request.draft) if sample else 0
        tokens = tuple(request.tokens[start:end])
        if drafts:
            tokens += tuple(request.draft[:drafts])
        step.chunks.append(
            Chunk(request.id, start, count, tokens, drafts, sample, blocks, request.params, request.prompt_len, history)
        )
        step.entries.append(entry)
        entry.planned = True
        step.budget -= count
        entry.in_flight += 1
        entry.guesses += drafts > 0
        request.computed = end
        request.pending += sample
        self._offer(entry)

    def _offer(self, entry: Entry) -> None:
        request, table = entry.request, entry.table
        if request.computed >= (table.offered + 1) * self.cache.block_size:
            self.cache.offer(table, request.tokens, min(len(request.tokens), request.computed))

    def _measure(self, plan: StepPlan, step: _PlanDraft) -> StepStats:
        decode = sum(c.count for c in plan.chunks if c.start >= c.prompt_len and c.count == 1 + c.num_draft)
        num_tokens = self.max_num_batched_tokens - step.budget
        padding = 0
        if self.policy.rectangular:
            self._batch_rows = max(self._batch_rows, len(self._running))
            padding = self._batch_rows * plan.max_query_len - num_tokens
        return StepStats(
            step=plan.step,
            started=self._clock.now(),
            num_tokens=num_tokens,
            num_prefill_tokens=num_tokens - decode,
            num_decode_tokens=decode,
            num_requests=len(plan.chunks),
            num_waiting=len(self._waiting),
            kv_blocks_used=self.cache.num_used,
            kv_blocks_total=self.cache.num_blocks,
            preempted=step.preempted,
            padding_tokens=padding,
        )

    # --------------------------------------------------------------------------------------------- results to state

    def update(self, plan: StepPlan, result: StepResult) -> list[Update]:
        """Take the result of the oldest plan in flight: what it changed, at most one update per request."""
        if result.step != plan.step or next(iter(self._in_flight), None) != plan.step:
            oldest = next(iter(self._in_flight), None)
            raise ValueError(f"result of step {result.step} for plan {plan.step}; the oldest in flight is {oldest}")
        entries = self._in_flight.pop(plan.step)
        for old in [step for step in self._stats if step < plan.step]:
            del self._stats[old]
        broken = broken_by(plan, result)
        if broken:
            self._distrust([entry for entry in entries if entry.request.id in broken])
        now = self._clock.now()
        updates, self._overdue = self._overdue, []
        for entry, chunk in zip(entries, plan.chunks, strict=True):
            update = self._settle(entry, chunk, result, broken.get(chunk.id), now)
            if update is not None:
                updates.append(update)
        return updates

    def _settle(self, entry: Entry, chunk: Chunk, result: StepResult, broken: str | None, now: float) -> Update | None:
        """One request's part of a result. Whatever goes wrong here ends this request only (law 6)."""
        entry.in_flight -= 1
        entry.guesses -= chunk.num_draft > 0
        if entry.state is State.DONE:
            if not entry.in_flight:
                self._release(entry)
            return None
        if broken is not None:
            return self._finish(entry, FinishReason.ERROR, error=broken)
        if entry.poisoned:
            if not entry.in_flight:
                self._preempt(entry)
            return None
        try:
            return self._absorb(entry, chunk, result, now)
        except Exception as error:
            return self._finish(entry, FinishReason.ERROR, error=f"{type(error).__name__} in the scheduler: {error}")

    def _absorb(self, entry: Entry, chunk: Chunk, result: StepResult, now: float) -> Update | None:
        request, timing = entry.request, entry.request.timing
        prompt_logprobs = self._fresh_prompt_logprobs(entry, chunk, result) if result.prompt_logprobs else ()
        if not chunk.sample:
            self.cache.verify(entry.table, chunk.start + chunk.count)
            return make_update(request, prompt_logprobs=prompt_logprobs) if prompt_logprobs else None
        new = result.tokens[request.id]
        kept, finish, stop_reason = stop(entry, new)
        rejected = chunk.num_draft - (len(new) - 1)
        request.tokens.extend(kept)
        request.pending -= 1
        request.computed -= rejected
        request.draft = [] if request.pending else list(result.drafts.get(request.id, ()))
        self._offer(entry)
        self.cache.verify(entry.table, chunk.start + chunk.count - rejected)
        if timing.first_token is None:
            timing.first_token = now
        timing.last_token = now
        logprobs = tuple(result.logprobs.get(request.id, ()))[: len(kept)] if result.logprobs else ()
        if finish is not None:
            return self._finish(entry, finish, kept, logprobs, prompt_logprobs, stop_reason)
        return make_update(request, kept, logprobs, prompt_logprobs)

    def _fresh_prompt_logprobs(self, entry: Entry, chunk: Chunk, result: StepResult) -> tuple:
        """Entries for prompt positions that were not handed out before; a chunk's first is ``max(1, start)``."""
        entries = result.prompt_logprobs.get(chunk.id, ())
        if not entries:
            return ()
        first = max(1, chunk.start)
        known = max(0, entry.judged - first)
        entry.judged = max(entry.judged, first + len(entries))
        return tuple(entries[known:])

    def _finish(self, entry: Entry, finish: FinishReason, *made: Any, error: str | None = None) -> Update:
        """The one way out of here: exactly one final update per accepted request (law 7)."""
        if entry.state is State.RUNNING:
            self._running.remove(entry)
        else:
            self._waiting.discard(entry)
        waiting, entry.state = entry.state is State.WAITING, State.DONE
        del self._requests[entry.request.id]
        if waiting:
            del self._entries[entry.request.id]
        elif not entry.in_flight:
            self._release(entry)
        return make_update(entry.request, *made, finish=finish, error=error)

    def _release(self, entry: Entry) -> None:
        self._give_back(entry)
        del self._entries[entry.request.id]

    def _give_back(self, entry: Entry) -> None:
        """Blocks, row and the runner's state."""
        assert not entry.in_flight, "law 3: a plan in flight mentions this request"
        self.cache.release(entry.table)
        self._rows -= 1
        if entry.planned:
            self._dropped.append(entry.request.id)
            entry.planned = False

    def _preempt(self, entry: Entry) -> None:
        """Completion plus re-admission (law 2): only the ids and the rank are kept, so it goes before later ones."""
        request = entry.request
        self._running.remove(entry)
        self._give_back(entry)
        request.computed = request.pending = 0
        request.draft = []
        request.preemptions += 1
        self.preempted += 1
        entry.poisoned = False
        entry.state = State.WAITING
        self._waiting.push(entry)

    def _distrust(self, failed: Sequence[Entry]) -> None:
        """Blocks that failed requests were writing are found no more, and who reads them already starts over."""
        suspects = list(failed)
        bad: set[int] = set()
        while suspects:
            blocks = set(self.cache.unverified(suspects.pop().table)) - bad
            self.cache.forget(blocks)
            bad |= blocks
            readers = [entry for entry in self._entries.values() if not entry.poisoned and entry not in failed]
            for entry in readers:
                if blocks.intersection(entry.table.blocks):
                    entry.poisoned = True
                    suspects.append(entry)
