"""A user's generation: its tokens, its state, and the times that its metrics are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from tuili.core.params import SamplingParams
from tuili.core.plan import TopLogprobs


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(slots=True)
class Timing:
    """Seconds on the engine's clock (interfaces.md 5.5): queue = scheduled - queued, prefill = first_token - scheduled,
    decode = last_token - first_token. ``None`` is "not yet"."""

    queued: float = 0.0
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None


@dataclass(slots=True)
class Request:
    """State of one generation in the scheduler.

    ``tokens`` is prompt + output; ``computed`` counts the leading ids whose KV is in the cache or in a plan in flight;
    ``pending`` counts sampled ids still on the device (depth 2). The whole state machine is
    ``need = len(tokens) + pending + len(draft) - computed`` (DESIGN.md 2).
    ``params`` are resolved: ``max_tokens`` is a number, ``eos_token_ids`` and ``seed`` are set. ``tenant`` and
    ``session`` say whose it is and to what conversation it belongs.
    """

    id: str
    prompt_len: int
    tokens: list[int]
    params: SamplingParams
    priority: int = 0
    salt: str = ""
    tenant: str = ""
    session: str = ""
    computed: int = 0
    pending: int = 0
    draft: list[int] = field(default_factory=list)
    #: Prompt tokens whose KV was reused at the first admission (usage.prompt_tokens_details.cached_tokens).
    cached: int = 0
    preemptions: int = 0
    timing: Timing = field(default_factory=Timing)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def need(self) -> int:
        return len(self.tokens) + self.pending + len(self.draft) - self.computed


@dataclass(frozen=True, slots=True)
class Update:
    """What a step changed for one request; the scheduler makes it, the client turns it into text.

    ``finish`` is set on the last update. ``stop_reason`` is the stop token id that ended it (None for eos).
    ``error`` tells why with ``finish == ERROR``.
    """

    id: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TopLogprobs, ...] = ()
    prompt_logprobs: tuple[TopLogprobs, ...] = ()
    finish: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    cached: int = 0
    preemptions: int = 0
    timing: Timing | None = None
