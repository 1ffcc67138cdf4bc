"""One request in the scheduler: its entry in the books, and the verdicts about it that need no other request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from tuili.base.errors import RequestError
from tuili.core.cache import BlockTable
from tuili.core.executor import Capacity
from tuili.core.plan import StepPlan, StepResult
from tuili.core.request import FinishReason, Request, Timing, Update


class State(Enum):
    WAITING = auto()
    RUNNING = auto()
    DONE = auto()


@dataclass(slots=True, eq=False)
class Entry:
    """What the scheduler knows of a request beyond the request itself."""

    request: Request
    rank: tuple[Any, int]
    table: BlockTable
    #: Ids, prompt included, at which the request ends by length.
    limit: int
    state: State = State.WAITING
    #: Plans in flight that mention it, and of those the ones with drafts: how far they get is not known yet.
    in_flight: int = 0
    #: A plan mentioned it since it was admitted: the runner has a row for it.
    planned: bool = False
    guesses: int = 0
    #: It read KV that a failed request was to write: forget what comes back, then compute everything again.
    poisoned: bool = False
    #: The first prompt position whose logprobs were not handed out yet; a preempted request computes some twice.
    judged: int = 1

    @property
    def length(self) -> int:
        return len(self.request.tokens) + self.request.pending


def check(request: Request, capacity: Capacity, known: bool = False) -> int:
    """The number of ids at which ``request`` ends by length; RequestError when it is malformed or can never run.
    ``known``: its ids were checked before."""
    _check_fields(request, known)
    longest, size, max_tokens = capacity.max_model_len, len(request.tokens), request.params.max_tokens
    limit = longest if max_tokens is None else request.prompt_len + max_tokens
    if limit > longest or size >= limit:
        raise RequestError(
            f"{size} prompt tokens + max_tokens {max_tokens} do not fit max_model_len {longest}; shorten the prompt to "
            f"fewer than {longest} tokens, lower max_tokens, or serve with a larger max_model_len",
            "max_tokens" if size < longest else "prompt",
        )
    blocks = -(-limit // capacity.block_size)
    if blocks > capacity.num_blocks:
        raise RequestError(
            f"{size} prompt tokens + max_tokens {max_tokens} need {blocks} KV blocks and the pool has "
            f"{capacity.num_blocks} ({capacity.num_positions} tokens); lower max_tokens, shorten the prompt, or give "
            "the KV cache more memory",
            "max_tokens",
        )
    return limit


def _check_fields(request: Request, known: bool) -> None:
    if not request.tokens or request.prompt_len < 1:
        raise RequestError("the prompt is empty; send at least one token", "prompt")
    tokens = request.tokens
    if not known and (set(map(type, tokens)) != {int} or min(tokens) < 0 or max(tokens) >= 2**31):
        wrong = next(t for t in tokens if type(t) is not int or not 0 <= t < 2**31)
        raise RequestError(f"token ids must be integers from 0 to 2**31 - 1, got {wrong!r}", "prompt")
    if not isinstance(request.priority, int):
        raise RequestError(f"priority must be an integer, got {request.priority!r}", "priority")
    for name, value in (("cache_salt", request.salt), ("tenant", request.tenant), ("session", request.session)):
        if not isinstance(value, str):
            raise RequestError(f"{name} must be a string, got {value!r}", name)


def broken_by(plan: StepPlan, result: StepResult) -> dict[str, str]:
    """Why requests of this plan cannot go on: the executor said so, or its answer for them is unusable."""
    broken = {}
    for chunk in plan.chunks:
        if chunk.id in result.failed:
            broken[chunk.id] = result.failed[chunk.id]
        elif result.drafts and not _are_ids(result.drafts.get(chunk.id, ())):
            broken[chunk.id] = f"the executor proposed drafts {result.drafts[chunk.id]} that are no token ids"
        elif chunk.sample:
            tokens = result.tokens.get(chunk.id, ())
            if not 1 <= len(tokens) <= chunk.num_draft + 1 or not _are_ids(tokens):
                broken[chunk.id] = (
                    f"the executor returned tokens {list(tokens)}; due were 1 to {chunk.num_draft + 1} ids"
                )
    return broken


def _are_ids(tokens: Sequence[int]) -> bool:
    return all(map(_is_id, tokens))


def _is_id(token: object) -> bool:
    return isinstance(token, int) and token >= 0


def stop(entry: Entry, new: Sequence[int]) -> tuple[tuple[int, ...], FinishReason | None, int | None]:
    """The ids to keep of ``new``, and whether the last one ends the request: eos, then stop ids, then length."""
    request, params = entry.request, entry.request.params
    length = len(request.tokens)
    for index, token in enumerate(new, 1):
        if length + index - request.prompt_len >= params.min_tokens:
            if not params.ignore_eos and token in params.eos_token_ids:
                return tuple(new[:index]), FinishReason.STOP, None
            if token in params.stop_token_ids:  # type: ignore[operator]
                return tuple(new[:index]), FinishReason.STOP, token
        if length + index >= entry.limit:
            return tuple(new[:index]), FinishReason.LENGTH, None
    return tuple(new), None, None


def make_update(
    request: Request,
    tokens: tuple[int, ...] = (),
    logprobs: tuple = (),
    prompt_logprobs: tuple = (),
    stop_reason: int | None = None,
    *,
    finish: FinishReason | None = None,
    error: str | None = None,
) -> Update:
    t = request.timing
    return Update(
        request.id,
        tokens,
        logprobs,
        prompt_logprobs,
        finish,
        stop_reason,
        error,
        request.cached,
        request.preemptions,
        Timing(t.queued, t.scheduled, t.first_token, t.last_token),
    )
