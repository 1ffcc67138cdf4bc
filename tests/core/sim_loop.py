"""The engine's loop in small, over the simulator: what every test of the scheduler drives."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from tuili.base.clock import VirtualClock
from tuili.core.executor import Capacity
from tuili.core.params import SamplingParams
from tuili.core.plan import Chunk, StepPlan, StepResult, StepStats
from tuili.core.policies import policies
from tuili.core.request import FinishReason, Request, Update
from tuili.core.scheduler import Scheduler
from tuili.executors.simulated import GARBAGE, LinearCost, SimExecutor, history_token

VOCAB = 50


def request(
    id: str, tokens: Iterable[int], max_tokens: int = 4, priority: int = 0, salt: str = "", **params
) -> Request:
    tokens = list(tokens)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, **params)
    return Request(id, len(tokens), tokens, sampling, priority, salt)


def naive(request: Request, vocab: int = VOCAB) -> tuple[list[int], FinishReason, int | None]:
    """The oracle: one request, token after token, no cache, no batch."""
    params, tokens = request.params, list(request.tokens[: request.prompt_len])
    while True:
        tokens.append(history_token(tokens, vocab))
        output = tokens[request.prompt_len :]
        if len(output) >= params.min_tokens:
            if tokens[-1] in params.eos_token_ids and not params.ignore_eos:
                return output, FinishReason.STOP, None
            if tokens[-1] in params.stop_token_ids:
                return output, FinishReason.STOP, tokens[-1]
        if len(output) == params.max_tokens:
            return output, FinishReason.LENGTH, None


class SimLoop:
    """A scheduler, a simulator, and plans in flight up to ``depth``; collects the updates and asserts the laws."""

    def __init__(
        self,
        blocks: int = 64,
        block_size: int = 4,
        max_model_len: int = 200,
        policy: str = "fcfs",
        policy_options: dict | None = None,
        budget: int = 64,
        seqs: int = 8,
        reuse: bool = True,
        chunked: bool = True,
        reserve: bool = False,
        depth: int = 1,
        cost: LinearCost | None = None,
        max_queued: int | None = None,
        drafts: Callable[[str, list[int]], list[int]] | None = None,
        fails: Callable[[StepPlan, Chunk], str | None] | None = None,
        change: Callable[[StepPlan, StepResult], StepResult] | None = None,
        vocab: int = VOCAB,
        verify: bool = True,
    ):
        capacity = Capacity(blocks, block_size, max_model_len)
        self.clock = VirtualClock()
        self.executor = SimExecutor(
            capacity, cost or LinearCost(1.0), self.clock, vocab_size=vocab, drafts=drafts, fails=fails, verify=verify
        )
        self.scheduler = Scheduler(
            capacity,
            policies.get(policy)(**(policy_options or {})),
            max_num_batched_tokens=budget,
            max_num_seqs=seqs,
            enable_prefix_caching=reuse,
            reserve_kv=reserve,
            enable_chunked_prefill=chunked,
            clock=self.clock,
            max_queued=max_queued,
        )
        self.depth = depth
        self.change = change or (lambda plan, result: result)
        self.in_flight: deque[tuple[StepPlan, StepResult]] = deque()
        self.plans: list[StepPlan] = []
        self.stats: list[StepStats] = []
        self.updates: dict[str, list[Update]] = {}
        self.finished: list[str] = []

    def add(self, *requests: Request) -> None:
        for one in requests:
            self.scheduler.add(one)
            self.updates.setdefault(one.id, [])

    def take(self, update: Update | None) -> None:
        if update is None:
            return
        seen = self.updates[update.id]
        assert not seen or seen[-1].finish is None, "an update after the last one"
        assert GARBAGE not in update.tokens
        seen.append(update)
        if update.finish is not None:
            self.finished.append(update.id)

    def step(self) -> None:
        """Schedule if the depth allows and there is something to do; else, or when it is full, take a result."""
        plan = self.scheduler.schedule() if len(self.in_flight) < self.depth else None
        if plan is not None:
            self.plans.append(plan)
            for chunk in plan.chunks:  # the last token of a request needs no KV, so nobody computes it
                assert chunk.start + chunk.count < chunk.prompt_len + (chunk.params.max_tokens or 10**9)
            self.stats.append(self.scheduler.stats(plan))
            self.in_flight.append((plan, self.executor.execute(plan).result()))
        if self.in_flight and (plan is None or len(self.in_flight) == self.depth):
            plan, result = self.in_flight.popleft()
            for update in self.scheduler.update(plan, self.change(plan, result)):
                self.take(update)
        elif plan is None:
            assert not self.scheduler.has_work, "work, nothing in flight and no plan: the loop hangs"
        self.scheduler.check_integrity()

    def drain(self, most: int = 5000) -> None:
        for _ in range(most):
            if not self.scheduler.has_work:
                break
            self.step()
        else:
            raise AssertionError(f"does not drain: {self.scheduler.requests}")
        assert not self.in_flight
        assert self.scheduler.cache.num_used == 0
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert all(updates[-1].finish is not None for updates in self.updates.values())

    def output(self, id: str) -> list[int]:
        return [token for update in self.updates[id] for token in update.tokens]

    def last(self, id: str) -> Update:
        return self.updates[id][-1]

    def assert_naive(self, *requests: Request) -> None:
        for one in requests:
            tokens, finish, reason = naive(one, self.executor.vocab_size)
            last = self.last(one.id)
            assert (self.output(one.id), last.finish, last.stop_reason) == (tokens, finish, reason), one.id
