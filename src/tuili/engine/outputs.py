"""What the engine says to those who asked: pieces of text as they come, and what a finished request was."""

from __future__ import annotations

from dataclasses import dataclass, field

from tuili.core.params import SamplingParams
from tuili.core.request import Timing


@dataclass(frozen=True, slots=True)
class TokenText:
    """One candidate: id, log-probability, text as displayed, and exact bytes (a token may be part of a character)."""

    id: int
    logprob: float
    text: str
    bytes: bytes


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A chosen (or prompt) token, its rank among all (1 = most likely), and the most likely ones, best first."""

    chosen: TokenText
    rank: int
    top: tuple[TokenText, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """New output of choice ``index`` of a request.

    ``text`` holds whole characters only and no part of a stop string (held back until it is sure). ``token_ids`` and
    ``logprobs`` are those of the tokens that arrived; their text may follow in a later delta. The last delta of each
    choice has ``finish_reason`` (stop, length, abort, error) and ``usage``; ``stop_reason`` is the stop string or stop
    token id that ended it. ``prompt_logprobs`` comes once, in the first delta of choice 0 (None for the first token).
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that ended, for metrics and accounts: one per engine request (n choices make n of them).

    Times are seconds on the engine's clock; ``arrival`` is when the frontend saw it, ``ended`` when it was done there.
    """

    id: str
    params: SamplingParams
    usage: Usage
    finish_reason: str
    arrival: float
    ended: float
    timing: Timing
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """Offline result of one choice, in vLLM's field names."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """Offline result of one prompt, in vLLM's field names: ``outputs`` has ``n`` completions."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion]
    finished: bool = True
    prompt_logprobs: list[TokenLogprob | None] | None = None
    num_cached_tokens: int = 0
    usage: list[Usage] = field(default_factory=list)
