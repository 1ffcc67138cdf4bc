"""What chat and completions share: the engine's deltas, choices put together, usage."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tuili.base.errors import OverloadedError
from tuili.engine.admission import Admitted
from tuili.engine.outputs import Choice, Delta
from tuili.server.metrics import Metrics

if TYPE_CHECKING:
    from tuili.engine.text import TextEngine


class Generation:
    """What one HTTP request asks of the engine. ``deltas`` may be iterated once; leaving it aborts what still runs.

    ``prompt_only`` (max_tokens 0) drops the one token that the engine must generate to score a prompt.
    """

    def __init__(self, engine: TextEngine, metrics: Metrics, admitted: Sequence[Admitted], prompt_only: bool = False):
        self.prompt_only = prompt_only
        self.admitted = admitted
        self.engine = engine
        self.metrics = metrics
        self.prompt_tokens = sum(len(each.ids) for each in admitted)
        self.completion_tokens = 0
        self._cached = dict.fromkeys(range(len(admitted)), 0)

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """(choice of the request, delta). Errors of the engine are raised as they come, and abort the rest."""
        watch = self.metrics.watch(self.engine.clock, self.admitted)
        async with aclosing(self.engine.stream(self.admitted)) as stream:
            try:
                async for number, delta in stream:
                    choice = self.admitted[number].first + delta.index
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
        found = [Choice() for each in self.admitted for _ in each.requests]
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


def without_output(delta: Delta) -> Delta:
    end = "length" if delta.finish_reason is not None else None
    return replace(delta, text="", token_ids=(), logprobs=None, finish_reason=end, stop_reason=None)
