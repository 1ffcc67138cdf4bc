"""``SamplingParams``: what a user may ask of sampling, with vLLM's names, ranges and defaults (interfaces.md 5.1)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from tuili.base.errors import RequestError

#: Below this temperature sampling is greedy, as in vLLM.
GREEDY_BELOW = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when generation stops.

    ``max_tokens`` is 16 offline as in vLLM; None means "to the end of the context" and is what the chat server uses.
    ``top_k`` 0 or -1 and ``logprobs`` -1 mean the whole vocabulary. ``seed`` None lets the engine draw one.
    Raises RequestError that names the field for values out of range.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] | list[str] | str | None = ()
    stop_token_ids: tuple[int, ...] | list[int] | None = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | list[int] | None = None
    bad_words: tuple[str, ...] | list[str] | None = ()
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    #: Token ids of ``bad_words``, filled by the tokenizer's side; each inner tuple is one forbidden sequence.
    bad_words_ids: tuple[tuple[int, ...], ...] = field(default=())
    #: Ids that end the text of this model, filled by the engine from generation_config.json.
    eos_token_ids: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        def set_(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        set_("stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        set_("stop_token_ids", tuple(self.stop_token_ids or ()))
        set_("bad_words", tuple(self.bad_words or ()))
        if self.top_k == -1:
            set_("top_k", 0)
        if self.allowed_token_ids is not None:
            set_("allowed_token_ids", tuple(self.allowed_token_ids))
        if self.logit_bias is not None:
            set_("logit_bias", {int(k): float(v) for k, v in self.logit_bias.items()})
        check(self)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that may end the text: eos (unless ignored), then ``stop_token_ids``."""
        own = tuple(self.stop_token_ids or ())
        return own if self.ignore_eos else tuple(dict.fromkeys(self.eos_token_ids + own))

    def with_(self, **changes: object) -> SamplingParams:
        return replace(self, **changes)  # type: ignore[arg-type]


def _whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be an integer, got {value!r}", name)


def _within(name: str, value: float, low: float, high: float, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RequestError(f"{name} must be a number, got {value!r}", name)
    below = value <= low if open_low else value < low
    if not math.isfinite(value) or below or value > high:
        bracket = "(" if open_low else "["
        raise RequestError(f"{name} must be in {bracket}{low:g}, {high:g}], got {value}", name)


def _all_ints(name: str, values: Iterable[object]) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise RequestError(f"{name} must hold token ids (integers >= 0), got {value!r}", name)


def check(p: SamplingParams) -> None:
    """Ranges of interfaces.md 5.1; RequestError names the first field at fault."""
    _check_lengths(p)
    _within("temperature", p.temperature, 0.0, 2.0)
    _within("top_p", p.top_p, 0.0, 1.0, open_low=True)
    _within("min_p", p.min_p, 0.0, 1.0)
    _within("repetition_penalty", p.repetition_penalty, 1e-6, 1e6)  # beyond, float32 scores overflow
    _within("presence_penalty", p.presence_penalty, -2.0, 2.0)
    _within("frequency_penalty", p.frequency_penalty, -2.0, 2.0)
    for name in ("top_k", "logprobs", "prompt_logprobs"):
        value = getattr(p, name)
        if value is not None:
            _whole(name, value)
            if value < -1:
                raise RequestError(f"{name} must be >= -1, got {value}", name)
    _check_tokens_and_strings(p)


def _check_lengths(p: SamplingParams) -> None:
    for name, low in (("n", 1), ("min_tokens", 0), ("max_tokens", 1)):
        value = getattr(p, name)
        if value is None and name == "max_tokens":
            continue
        _whole(name, value)
        if value < low:
            raise RequestError(f"{name} must be at least {low}, got {value}", name)
    if p.max_tokens is not None and p.min_tokens > p.max_tokens:
        raise RequestError(f"min_tokens {p.min_tokens} is more than max_tokens {p.max_tokens}", "min_tokens")
    if p.n > 1 and p.greedy:
        raise RequestError(f"n must be 1 with greedy sampling (temperature 0), got {p.n}", "n")
    if p.seed is not None:
        _whole("seed", p.seed)
        if not -(2**63) <= p.seed < 2**63:
            raise RequestError(f"seed must fit in 64 bits, got {p.seed}", "seed")


def _check_tokens_and_strings(p: SamplingParams) -> None:
    for name in ("stop", "bad_words"):
        for text in getattr(p, name):
            if not isinstance(text, str) or not text:
                raise RequestError(f"{name} must hold non-empty strings, got {text!r}", name)
    _all_ints("stop_token_ids", p.stop_token_ids or ())
    if p.allowed_token_ids is not None:
        if not p.allowed_token_ids:
            raise RequestError("allowed_token_ids must not be empty", "allowed_token_ids")
        _all_ints("allowed_token_ids", p.allowed_token_ids)
    if p.logit_bias:
        _all_ints("logit_bias", p.logit_bias)
        for token, bias in p.logit_bias.items():
            _within(f"logit_bias[{token}]", bias, -100.0, 100.0)
