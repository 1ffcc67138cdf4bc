"""From a request's fields to ``SamplingParams`` and limits: the user's value, else the model's default, else vLLM's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tuili.base.config import Config
from tuili.base.errors import RequestError
from tuili.core.params import SamplingParams
from tuili.server.protocol import ChatRequest, CompletionRequest, Control

if TYPE_CHECKING:
    from tuili.engine.text import TextEngine

#: Choices (prompts x n) of one request.
MAX_CHOICES = 1024
SALT_LENGTH = 128
SALT_FORBIDDEN = "@/\\\0"

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
    request: ChatRequest | CompletionRequest, engine: TextEngine, max_tokens: int, logprobs: int | None
) -> SamplingParams:
    """Raises RequestError that names the field for values out of range."""
    defaults = engine.sampling_defaults
    values: dict[str, Any] = {name: defaults[name] for name in PLAIN if defaults.get(name) is not None}
    values |= {name: getattr(request, name) for name in PLAIN if getattr(request, name) is not None}
    if request.logit_bias:
        values["logit_bias"] = {_token_id(key): bias for key, bias in request.logit_bias.items()}
    return SamplingParams(**values, max_tokens=max_tokens, logprobs=logprobs)


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise RequestError(f"logit_bias must have token ids as keys, got {key[:40]!r}", "logit_bias")
    return int(key)


def output_limit(asked: int | None, param: str, prompt_len: int, engine: TextEngine, prompt_param: str) -> int:
    """Tokens to generate: as asked, if they fit; None: what the context leaves, at most the model's max_new_tokens."""
    room = engine.max_model_len - prompt_len
    if room < 1:
        raise RequestError(
            f"the prompt has {prompt_len} tokens and the model takes {engine.max_model_len} for prompt and output "
            f"together; shorten it to at most {engine.max_model_len - 1}, or set truncate_prompt_tokens",
            prompt_param,
        )
    if asked is None:
        return min(room, engine.sampling_defaults.get("max_new_tokens") or room)
    if asked > room:
        raise RequestError(
            f"{prompt_len} prompt tokens and {param} {asked} are more than the model's {engine.max_model_len} tokens; "
            f"lower {param} to {room} or shorten the prompt",
            param,
        )
    return asked


def check_logprobs(name: str, value: int | None, config: Config) -> int | None:
    """``value`` if the server allows so many; -1 asks for the whole vocabulary."""
    if value is None:
        return None
    if value < -1:
        raise RequestError(f"{name} must be >= -1, got {value}", name)
    limit = config.max_logprobs
    if limit != -1 and (value == -1 or value > limit):
        raise RequestError(f"{name} must be at most {limit} (--max-logprobs), got {value}", name)
    return value


def check_control(request: Control, config: Config) -> None:
    """Rules between fields that are not about one value's range."""
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream: true", "stream_options")
    if request.priority and config.scheduling_policy != "priority":
        raise RequestError(
            f"priority {request.priority} needs a server with --scheduling-policy priority; this one has "
            f"{config.scheduling_policy}",
            "priority",
        )
    check_salt(request.cache_salt)


def check_salt(salt: str | None) -> None:
    if salt is None:
        return
    if not 1 <= len(salt) <= SALT_LENGTH or any(char in SALT_FORBIDDEN for char in salt):
        raise RequestError(
            f"cache_salt must have 1 to {SALT_LENGTH} characters and none of @ / \\ NUL, got {salt[:40]!r}",
            "cache_salt",
        )


def check_choices(prompts: int, n: int | None) -> None:
    if n is not None and prompts * n > MAX_CHOICES:
        raise RequestError(f"a request may have {MAX_CHOICES} choices, got {prompts} prompts x n {n}", "n")
    if prompts > MAX_CHOICES:
        raise RequestError(f"a request may have {MAX_CHOICES} choices, got {prompts} prompts", "prompt")


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
