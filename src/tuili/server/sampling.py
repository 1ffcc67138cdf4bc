"""From a request's fields to what is asked of the engine: the user's value, else the model's default, else vLLM's."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tuili.base.errors import RequestError
from tuili.core.params import SamplingParams
from tuili.engine.admission import MAX_CHOICES, Asked, too_many_choices
from tuili.server.protocol import ChatRequest, CompletionRequest, Control
from tuili.server.service import Call, Service

if TYPE_CHECKING:
    from tuili.engine.text import TextEngine

#: Fields of a request that go into SamplingParams as they are.
PLAIN = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "allowed_token_ids",
    "bad_words",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "prompt_logprobs",
)


def sampling_params(
    request: ChatRequest | CompletionRequest, engine: TextEngine, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """Raises RequestError that names the field for values out of range."""
    defaults = engine.sampling_defaults
    values: dict[str, Any] = {name: defaults[name] for name in PLAIN if defaults.get(name) is not None}
    values |= {name: getattr(request, name) for name in PLAIN if getattr(request, name) is not None}
    for name in ("stop_token_ids", "allowed_token_ids"):
        size, most = len(values.get(name) or ()), engine.bounds.vocab_size
        if size > most:  # told before anybody looks at them one by one
            raise RequestError(f"{name} has {size} ids, and the vocabulary {most}; name each once", name)
    if request.logit_bias:
        values["logit_bias"] = {_token_id(key): bias for key, bias in request.logit_bias.items()}
    return SamplingParams(**values, max_tokens=max_tokens, logprobs=logprobs)


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise RequestError(f"logit_bias must have token ids as keys, got {key[:40]!r}", "logit_bias")
    return int(key)


def asked(call: Call, request: Control, ids: list[int], params: SamplingParams) -> Asked:
    """Clients may repeat a request's id, the engine must not see it twice."""
    id = f"{call.id}-{uuid.uuid4().hex[:8]}"
    return Asked(ids, params, id, call.arrival, request.priority or 0, request.cache_salt)


@contextmanager
def called(names: Mapping[str, str]) -> Iterator[None]:
    """Errors of the engine in the words of a route: ``names`` maps the engine's fields to the route's."""
    try:
        yield
    except RequestError as error:
        if error.param is None or error.param not in names:
            raise
        name, text = names[error.param], str(error)
        shown = text if error.param == "prompt" else re.sub(rf"\b{error.param}\b", name, text)
        raise RequestError(shown, name) from error


def check_control(request: Control) -> None:
    """Rules between fields that are not about one value's range."""
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream: true", "stream_options")


def check_choices(service: Service, prompts: int, n: int | None) -> None:
    bounds = service.engine.bounds
    if prompts * (n or 1) > min(MAX_CHOICES, bounds.max_requests or MAX_CHOICES):
        raise too_many_choices(prompts * (n or 1), bounds, prompts if n is None or prompts > MAX_CHOICES else 1)


def truncated(ids: list[int], request: Control, engine: TextEngine, reserve: int) -> list[int]:
    """At most ``truncate_prompt_tokens`` ids (-1: what leaves ``reserve`` for the output); the left end goes first."""
    keep = request.truncate_prompt_tokens
    if keep is None:
        if request.truncation_side is not None:
            raise RequestError("truncation_side needs truncate_prompt_tokens", "truncation_side")
        return ids
    if keep < -1 or keep == 0:
        raise RequestError(f"truncate_prompt_tokens must be -1 or at least 1, got {keep}", "truncate_prompt_tokens")
    if keep > engine.max_model_len:
        raise RequestError(
            f"truncate_prompt_tokens {keep} is more than the context of {engine.max_model_len}",
            "truncate_prompt_tokens",
        )
    if keep == -1:
        keep = max(1, engine.max_model_len - reserve)
    return ids[:keep] if request.truncation_side == "right" else ids[-keep:]
