"""The two messages between the planes (DESIGN.md 2): a ``StepPlan`` goes down, a ``StepResult`` comes back."""

from __future__ import annotations

from dataclasses import dataclass, field

from tuili.core.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Chunk:
    """One request's share of a step: positions ``start .. start + count`` are computed.

    ``tokens`` are the ids at those positions; the last one is missing while it is still on the device (depth 2).
    The first chunk of an admission carries ``history``: all ids before ``start``, whose KV is reused.
    ``new_blocks`` are appended to the request's block table before the step (on admission: the whole table so far,
    reused blocks first). ``sample`` asks for one token after the last position. ``prompt_len`` counts the ids that the
    user gave: penalties, ``min_tokens`` and seeds need to know where the output starts.
    """

    id: str
    start: int
    count: int
    tokens: tuple[int, ...]
    num_draft: int
    sample: bool
    new_blocks: tuple[int, ...]
    params: SamplingParams
    prompt_len: int
    history: tuple[int, ...] = ()

    @property
    def admitted(self) -> bool:
        """True on the first chunk of an admission (also after preemption): the runner starts from no state."""
        return self.start == len(self.history)


@dataclass(frozen=True, slots=True)
class BlockMove:
    """Copy the KV of block ``source`` to block ``target`` before the step."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes. ``dropped`` are requests whose runner state goes away before the step."""

    step: int
    chunks: tuple[Chunk, ...]
    dropped: tuple[str, ...] = ()
    moves: tuple[BlockMove, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)

    @property
    def max_query_len(self) -> int:
        return max((chunk.count for chunk in self.chunks), default=0)


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """Log-probability of a token, its rank (1 = most likely) and the most likely (token, logprob), best first."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepStats:
    """The one record per step (DESIGN.md 5). Times in seconds, KV in blocks.

    The executor fills ``device_seconds`` (model and sampling); the engine fills the rest with ``dataclasses.replace``.
    """

    step: int = 0
    device_seconds: float = 0.0
    schedule_seconds: float = 0.0
    update_seconds: float = 0.0
    started: float = 0.0
    num_tokens: int = 0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_requests: int = 0
    num_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    preempted: int = 0
    padding_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step produced, by request id.

    ``tokens`` new tokens in order (with drafts: the accepted ones and one more); ``logprobs`` one entry per new token
    when asked for; ``prompt_logprobs`` entries for the prompt positions ``max(1, start) ..`` of the request's chunk, in
    order (the first prompt token has none); ``failed`` why a request died in the data plane (law 6: it alone ends).
    """

    step: int
    tokens: dict[str, list[int]]
    drafts: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[TopLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TopLogprobs]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    stats: StepStats = field(default_factory=StepStats)
