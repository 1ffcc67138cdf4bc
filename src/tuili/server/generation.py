"""What chat and completions share: jobs for the engine, their deltas in one stream, choices put together, usage."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tuili.base.errors import OverloadedError
from tuili.core.params import SamplingParams
from tuili.engine.outputs import Delta, TokenLogprob, Usage
from tuili.server.metrics import Metrics

if TYPE_CHECKING:
    from tuili.engine.text import TextEngine

#: Longer texts are tokenized in another thread, so that the streams of the others go on.
INLINE_CHARACTERS = 20_000


async def encode(engine: TextEngine, text: str, add_special_tokens: bool) -> list[int]:
    if len(text) <= INLINE_CHARACTERS:
        return engine.tokenizer.encode(text, add_special_tokens)
    return await asyncio.to_thread(engine.tokenizer.encode, text, add_special_tokens)


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt for the engine; its choices are ``first .. first + params.n`` of the request."""

    ids: list[int]
    params: SamplingParams
    first: int
    id: str
    priority: int = 0
    salt: str = ""
    arrival: float = 0.0


@dataclass(slots=True)
class Choice:
    """The output of one choice, put together from its deltas."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    usage: Usage | None = None

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs or ())
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason, self.usage = delta.finish_reason, delta.stop_reason, delta.usage


class Generation:
    """The jobs of one HTTP request. ``deltas`` may be iterated once; leaving it aborts what still runs.

    ``prompt_only`` (max_tokens 0) drops the one token that the engine must generate to score a prompt.
    """

    def __init__(self, engine: TextEngine, metrics: Metrics, jobs: Sequence[Job], prompt_only: bool = False):
        self.prompt_only = prompt_only
        self.jobs = jobs
        self.engine = engine
        self.metrics = metrics
        self.prompt_tokens = sum(len(job.ids) for job in jobs)
        self.completion_tokens = 0
        self._cached = dict.fromkeys(range(len(jobs)), 0)

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """(choice of the request, delta). Errors of the engine are raised as they come, and abort the other jobs."""
        watch = self.metrics.watch(self.engine.clock, self.jobs)
        async with aclosing(merged([self._start(job) for job in self.jobs])) as stream:
            try:
                async for number, delta in stream:
                    choice = self.jobs[number].first + delta.index
                    if self.prompt_only:
                        delta = without_output(delta)
                    self._count(number, delta)
                    watch.delta(choice, len(delta.token_ids))
                    yield choice, delta
            except OverloadedError:
                self.metrics.rejected()
                raise
        watch.done()

    def _count(self, number: int, delta: Delta) -> None:
        self.completion_tokens += len(delta.token_ids)
        if delta.usage is not None and delta.index == 0:
            self._cached[number] = delta.usage.cached_tokens

    async def choices(self) -> list[Choice]:
        found = [Choice() for job in self.jobs for _ in range(job.params.n)]
        async with aclosing(self.deltas()) as stream:
            async for index, delta in stream:
                found[index].add(delta)
        return found

    def usage(self) -> dict[str, Any]:
        """Usage so far, over all choices; a prompt counts once however many choices it has."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }

    def _start(self, job: Job) -> AsyncIterator[Delta]:
        return self.engine.generate(
            job.ids,
            job.params,
            request_id=f"{job.id}-{uuid.uuid4().hex[:8]}",  # clients may repeat an id, the engine must not see it twice
            priority=job.priority,
            cache_salt=job.salt,
            arrival=job.arrival,
        )


def without_output(delta: Delta) -> Delta:
    end = "length" if delta.finish_reason is not None else None
    return replace(delta, text="", token_ids=(), logprobs=None, finish_reason=end, stop_reason=None)


async def merged(streams: Sequence[AsyncIterator[Delta]]) -> AsyncGenerator[tuple[int, Delta], None]:
    """All streams in one, items with their stream's number; the first error ends them all. No task for a single one."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:  # type: ignore[type-var]
            async for delta in only:
                yield 0, delta
        return
    queue: asyncio.Queue[tuple[int, Delta | Exception | None]] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(number, stream, queue)) for number, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            number, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield number, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(number: int, stream: AsyncIterator[Delta], queue: asyncio.Queue[Any]) -> None:
    try:
        async with aclosing(stream) as items:  # type: ignore[type-var]
            async for item in items:
                queue.put_nowait((number, item))
        queue.put_nowait((number, None))
    except Exception as error:
        queue.put_nowait((number, error))
