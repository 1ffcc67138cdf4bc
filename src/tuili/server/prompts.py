"""From messages to a prompt: the checks that a chat template cannot make, then the template itself."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from tuili.base.config import Config
from tuili.base.errors import RequestError
from tuili.engine.tokenizer import LONG_TEXT
from tuili.server.protocol import ChatRequest, Message, TokenizeRequest

if TYPE_CHECKING:
    from tuili.engine.text import TextEngine

MARKUP = 20
#: Names that the server gives to the template itself.
RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"}
)


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
