"""From a request's fields to what is asked of the engine: the ids of its prompt, and how to go on from there.

A field's value is the user's, else the model's default, else vLLM's. What a chat template cannot check is checked here.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tuili.base.config import Config
from tuili.base.errors import RequestError
from tuili.core.params import SamplingParams
from tuili.engine.admission import MAX_CHOICES, Asked, too_many_choices
from tuili.engine.tokenizer import LONG_TEXT
from tuili.server.protocol import ChatRequest, CompletionRequest, Control, Message, TokenizeRequest
from tuili.server.service import Call, Service

if TYPE_CHECKING:
    from tuili.engine.text import TextEngine

#: Characters that a template may put around a message.
MARKUP = 20
#: Names that the server gives to the template itself.
RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"}
)
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
    values |= {name: value for name in PLAIN if (value := getattr(request, name)) is not None}
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
    id = f"{call.id}-{random.getrandbits(32):08x}"
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


# ----------------------------------------------------------------------------------------------------- chats


def opens_answer(request: ChatRequest | TokenizeRequest) -> bool:
    """Whether the prompt ends with the start of an answer: yes, unless the last message is to be continued."""
    if request.continue_final_message and request.add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt cannot both be true", "continue_final_message"
        )
    if request.add_generation_prompt is None:
        return not request.continue_final_message
    return request.add_generation_prompt


async def encode_chat(
    request: ChatRequest | TokenizeRequest, engine: TextEngine, config: Config, kwargs: dict[str, Any], fits: bool
) -> list[int]:
    """Token ids of the rendered chat, which must fit the context unless ``fits`` is False. RequestError for wrong
    messages, no template, or a template that refuses them."""
    if request.chat_template is not None and not config.trust_request_chat_template:
        raise RequestError(
            "chat_template in a request runs code of the client; start the server with --trust-request-chat-template "
            "to allow it",
            "chat_template",
        )
    taken = RESERVED & (request.chat_template_kwargs or {}).keys()
    if taken:
        raise RequestError(f"chat_template_kwargs cannot set {', '.join(sorted(taken))}", "chat_template_kwargs")
    options: dict[str, Any] = {
        "tools": request.tools or None,
        "documents": getattr(request, "documents", None),
        "chat_template": request.chat_template,
        "add_generation_prompt": opens_answer(request),
        "continue_final_message": bool(request.continue_final_message),
        "add_special_tokens": bool(request.add_special_tokens),
        "kwargs": {**kwargs, **(request.chat_template_kwargs or {})},
        "fits": fits,
    }

    def encode() -> list[int]:
        return engine.encode_chat([plain_message(message) for message in request.messages or ()], **options)

    plain = not (request.chat_template or options["tools"] or options["documents"])
    if plain and sum(map(_size, request.messages or ())) <= LONG_TEXT:
        return encode()
    return await asyncio.to_thread(encode)


def _size(message: Message) -> int:
    """Characters of a message, and some for what the template puts around it."""
    content = message.content or ""
    parts = [content] if isinstance(content, str) else [part.text or "" for part in content]
    return sum(len(text) + MARKUP for text in parts)


def plain_message(message: Message) -> dict[str, Any]:
    """The message as templates know it, ``reasoning`` under both of its names."""
    plain = message.model_dump(exclude_none=True)
    reasoning = plain.get("reasoning", plain.get("reasoning_content"))
    if reasoning is not None:
        plain["reasoning"] = plain["reasoning_content"] = reasoning
    return plain
