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
    choice has ``finish_reason`` (stop, length, abort, error), ``usage`` and ``timing``; ``stop_reason`` is the
    stop string or stop token id that ended it. ``prompt_logprobs`` comes once, in the first delta of choice 0 (None for
    the first token).
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    usage: Usage | None = None
    timing: Timing | None = None


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
    timing: Timing | None = None

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs or ())
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
            self.usage, self.timing = delta.usage, delta.timing


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
    tenant: str = ""
    session: str = ""


# ---------------------------------------------------------------------------------------- offline, vLLM's field names


@dataclass(slots=True)
class Logprob:
    """``rank`` counts from 1, the most likely token; ``decoded_token`` shows part of a character as U+FFFD."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


class Candidates(dict[int, Logprob]):
    """The tokens looked at for one position, by id as in vLLM: the chosen one first, then the most likely, best first;
    of one that is both there is one entry."""

    @property
    def chosen(self) -> Logprob:
        return next(iter(self.values()))


def logprobs_by_id(entry: TokenLogprob) -> Candidates:
    chosen = entry.chosen
    found = Candidates({chosen.id: Logprob(chosen.logprob, entry.rank, chosen.text)})
    for rank, token in enumerate(entry.top, 1):
        found.setdefault(token.id, Logprob(token.logprob, rank, token.text))
    return found


@dataclass(slots=True)
class Completion:
    """Result of one choice. ``logprobs`` has a table of candidates for each token."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[Candidates] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """When things happened, seconds on the engine's clock (None: never), of the first choice."""

    arrival_time: float
    queued_ts: float
    scheduled_ts: float | None
    first_token_ts: float | None
    last_token_ts: float | None
    num_generation_tokens: int

    @property
    def first_token_latency(self) -> float | None:
        return None if self.first_token_ts is None else self.first_token_ts - self.arrival_time


@dataclass(slots=True)
class RequestOutput:
    """Result of one prompt: ``outputs`` has ``n`` completions. ``prompt_logprobs`` is None for the first token."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion]
    finished: bool = True
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    usage: list[Usage] = field(default_factory=list)
    metrics: RequestMetrics | None = None
