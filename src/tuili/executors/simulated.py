"""Plans priced instead of run: the same scheduler under a virtual clock, no tensors, no torch.

The simulator keeps what a runner keeps (ids and block tables, rebuilt from the deltas of the plans) and a make-believe
KV cache that remembers the history each position was computed from. So it can say for every plan whether a real runner
would have computed the right thing; it raises PlanError where not.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from tuili.base.clock import VirtualClock
from tuili.core.executor import Capacity
from tuili.core.plan import Chunk, StepPlan, StepResult, StepStats

#: What comes out when KV is read that a failed request should have written; no test may ever see it in an output.
GARBAGE = 2**31 - 1
_MASK = 2**64 - 1


class PlanError(RuntimeError):
    """A plan that a runner could not execute correctly: a bug in the scheduler."""


class CostModel(Protocol):
    def seconds(self, plan: StepPlan) -> float:
        """How long the step takes."""
        ...


@dataclass(frozen=True, slots=True)
class LinearCost:
    """Seconds per step, per token computed, and per position of context that a row attends to."""

    per_step: float = 0.0
    per_token: float = 0.0
    per_context_token: float = 0.0

    def seconds(self, plan: StepPlan) -> float:
        context = sum(chunk.start + chunk.count for chunk in plan.chunks)
        return self.per_step + self.per_token * plan.num_tokens + self.per_context_token * context


def extend_history(state: int, token: int) -> int:
    """A 64-bit digest of a history, one token longer: cheap, order matters, one bit of input changes about half."""
    state = ((state ^ (token + 1)) * 0x9E3779B97F4A7C15) & _MASK
    return state ^ (state >> 32)


def history_token(history: list[int], vocab_size: int) -> int:
    """The simulated model: the next token is a digest of all tokens before it."""
    state = 0
    for token in history:
        state = extend_history(state, token)
    return (state >> 11) % vocab_size


@dataclass(slots=True)
class _SimulatedRow:
    """One request as a runner sees it. ``states[i]`` digests ``tokens[: i + 1]``; its next chunk starts at ``next``."""

    table: list[int]
    tokens: list[int] = field(default_factory=list)
    states: list[int] = field(default_factory=list)
    next: int = 0
    clean: bool = True

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.states.append(extend_history(self.states[-1] if self.states else 0, token))


class SimExecutor:
    """Executes plans at once and moves ``clock`` by ``cost``.

    ``tokens(id, history)`` is the model; by default ``history_token``. ``drafts(id, history)`` proposes ids for the
    next step. ``fails(plan, chunk)`` returns why that chunk fails, or None; a failed chunk leaves garbage in the blocks
    that it was to write. ``verify`` checks every position that a chunk reads, O(context) per step; the checks of the
    plan's form are always on.
    """

    def __init__(
        self,
        capacity: Capacity,
        cost: CostModel,
        clock: VirtualClock,
        tokens: Callable[[str, list[int]], int] | None = None,
        *,
        vocab_size: int = 32_000,
        drafts: Callable[[str, list[int]], list[int]] | None = None,
        fails: Callable[[StepPlan, Chunk], str | None] | None = None,
        verify: bool = False,
    ):
        self.capacity = capacity
        self.cost = cost
        self.clock = clock
        self.vocab_size = vocab_size
        self.verify = verify
        self._model = tokens
        self._drafts = drafts
        self._fails = fails
        self._rows: dict[str, _SimulatedRow] = {}
        #: block -> digest of the history at each of its positions; None where garbage was written.
        self._kv: dict[int, list[int | None]] = {}
        self._step = -1

    def execute(self, plan: StepPlan) -> Future[StepResult]:
        """A completed future. Raises PlanError for a plan that no runner could execute."""
        if plan.step <= self._step:
            raise PlanError(f"step {plan.step} after step {self._step}")
        self._step = plan.step
        for id in plan.dropped:
            if self._rows.pop(id, None) is None:
                raise PlanError(f"step {plan.step} drops {id!r}, which is not here")
        failed = {c.id: why for c in plan.chunks if self._fails and (why := self._fails(plan, c)) is not None}
        self._write(plan, failed)
        if self.verify:
            for chunk in plan.chunks:
                self._read(chunk)
        tokens = {c.id: self._sample(c) for c in plan.chunks if c.sample}
        drafts = {id: self._drafts(id, self._rows[id].tokens) for id in tokens} if self._drafts else {}
        seconds = self.cost.seconds(plan)
        self.clock.advance(seconds)
        done: Future[StepResult] = Future()
        tokens = {id: new for id, new in tokens.items() if id not in failed}
        done.set_result(
            StepResult(plan.step, tokens, drafts, failed=failed, stats=StepStats(plan.step, device_seconds=seconds))
        )
        return done

    def close(self) -> None:
        self._rows.clear()
        self._kv.clear()

    def _write(self, plan: StepPlan, failed: dict[str, str]) -> None:
        writers: dict[int, str] = {}
        for chunk in plan.chunks:
            row = self._rows[chunk.id] = self._row(chunk)
            ids = self._ids(chunk, row)
            row.clean = row.clean and chunk.id not in failed
            state = row.states[chunk.start - 1] if chunk.start else 0
            for position, token in enumerate(ids, chunk.start):
                block, slot = row.table[position // self.capacity.block_size], position % self.capacity.block_size
                if writers.setdefault(block, chunk.id) != chunk.id:
                    raise PlanError(f"block {block} is written by {writers[block]!r} and {chunk.id!r}")
                state = extend_history(state, token)
                if self.verify:
                    self._kv.setdefault(block, [None] * self.capacity.block_size)[slot] = state if row.clean else None

    def _row(self, chunk: Chunk) -> _SimulatedRow:
        """The request's state with this chunk's blocks and place checked."""
        row = self._rows.get(chunk.id)
        if chunk.admitted:
            if row is not None:
                raise PlanError(f"{chunk.id!r} is admitted twice")
            row = _SimulatedRow([], next=chunk.start)
            for token in chunk.history:
                row.append(token)
        elif row is None:
            raise PlanError(f"{chunk.id!r} starts at {chunk.start} without history")
        row.table.extend(chunk.new_blocks)
        size, count = self.capacity.block_size, self.capacity.num_blocks
        if chunk.start != row.next or chunk.count < 1:
            raise PlanError(f"{chunk.id!r} computes {chunk.count} positions at {chunk.start}, expected {row.next}")
        if len(row.table) * size < chunk.start + chunk.count:
            raise PlanError(f"{chunk.id!r} has {len(row.table)} blocks for {chunk.start + chunk.count} positions")
        if chunk.start + chunk.count > self.capacity.max_model_len:
            raise PlanError(f"{chunk.id!r} computes past max_model_len {self.capacity.max_model_len}")
        if any(not 0 <= block < count for block in chunk.new_blocks) or len(set(row.table)) < len(row.table):
            raise PlanError(f"{chunk.id!r} has an invalid block table {row.table}")
        return row

    def _ids(self, chunk: Chunk, row: _SimulatedRow) -> list[int]:
        """The ids at the chunk's positions: those it carries, and the last sampled one if it is still on the device."""
        ids = list(chunk.tokens)
        if len(ids) < chunk.count:
            ids += row.tokens[chunk.start + len(ids) : chunk.start + chunk.count]
        if len(ids) != chunk.count or chunk.num_draft >= chunk.count:
            raise PlanError(f"{chunk.id!r}: {len(ids)} ids, {chunk.num_draft} drafts, for {chunk.count} positions")
        for position, token in enumerate(ids[: chunk.count - chunk.num_draft], chunk.start):
            if position == len(row.tokens):
                row.append(token)
            elif row.tokens[position] != token:
                raise PlanError(f"{chunk.id!r}: id {token} at {position}, sampled was {row.tokens[position]}")
        row.next = chunk.start + chunk.count
        return ids

    def _read(self, chunk: Chunk) -> None:
        """What attention would read: positions before and in the chunk, drafts left out; garbage in, garbage out."""
        row, size = self._rows[chunk.id], self.capacity.block_size
        for position in range(chunk.start + chunk.count - chunk.num_draft):
            found = self._kv.get(row.table[position // size], [])
            if not found:
                raise PlanError(f"{chunk.id!r} reads position {position} that nobody wrote")
            if found[position % size] is None:
                row.clean = False
            elif row.clean and found[position % size] != row.states[position]:
                raise PlanError(f"{chunk.id!r} reads KV of another history at position {position}")
        if not row.clean:
            for position in range(chunk.start, chunk.start + chunk.count):
                self._kv[row.table[position // size]][position % size] = None

    def _sample(self, chunk: Chunk) -> list[int]:
        """The model's tokens after the chunk: as many drafts as it agrees with, and one more."""
        row = self._rows[chunk.id]
        drafts = chunk.tokens[len(chunk.tokens) - chunk.num_draft :]
        new: list[int] = []
        while True:
            new.append(self._next(chunk.id, row))
            row.append(new[-1])
            if len(new) > len(drafts) or drafts[len(new) - 1] != new[-1]:
                break
        row.next = chunk.start + chunk.count - (chunk.num_draft - len(new) + 1)
        return new

    def _next(self, id: str, row: _SimulatedRow) -> int:
        if not row.clean:
            return GARBAGE
        if self._model is not None:
            return self._model(id, row.tokens)
        return (row.states[-1] >> 11) % self.vocab_size
