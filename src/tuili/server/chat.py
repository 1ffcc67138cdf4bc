"""POST /v1/chat/completions (interfaces.md 5.1): one answer as JSON, or as chunks while it is written."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any

from tuili.base.errors import RequestError
from tuili.engine.outputs import Choice, Delta, TokenLogprob
from tuili.server import schemas
from tuili.server.body import read
from tuili.server.generation import Generation
from tuili.server.http import Exchange, Response
from tuili.server.inputs import (
    asked,
    called,
    check_choices,
    check_control,
    encode_chat,
    opens_answer,
    sampling_params,
    truncated,
)
from tuili.server.logprobs import chat_logprobs, prompt_logprobs
from tuili.server.protocol import ChatRequest
from tuili.server.service import BODY_ERRORS, Call, Route, Service
from tuili.server.wire import Envelopes, event


class Chat:
    """One request: checked and tokenized by ``open``, answered by ``answer()`` or ``events()``."""

    def __init__(self, request: ChatRequest, call: Call, generation: Generation):
        self.request = request
        self.generation = generation
        self.head: dict[str, Any] = {"id": f"chatcmpl-{call.id}", "created": call.created, "model": call.model}
        self.role = "assistant" if opens_answer(request) else request.messages[-1].role
        self.prefix = echoed(request, self.role)

    @classmethod
    async def open(cls, service: Service, call: Call, request: ChatRequest) -> Chat:
        """Raises RequestError, with ``param``, for whatever the engine could not do as asked."""
        check_fields(request, service)
        kwargs = {} if request.reasoning_effort is None else {"reasoning_effort": request.reasoning_effort}
        ids = await encode_chat(request, service.engine, service.config, kwargs, request.truncate_prompt_tokens is None)
        names = {"prompt": "messages", "logprobs": "top_logprobs"}
        limit = request.max_completion_tokens
        if limit is None:
            limit = request.max_tokens
        else:
            names["max_tokens"] = "max_completion_tokens"
        ids = truncated(ids, request, service.engine, limit or 1)
        top = (request.top_logprobs or 0) if request.logprobs else None
        params = sampling_params(request, service.engine, limit, top)
        with called(names):
            admitted = await service.engine.admit([asked(call, request, ids, params)])
        return cls(request, call, Generation(service.engine, service.metrics, admitted))

    async def answer(self) -> dict[str, Any]:
        choices = await self.generation.choices()
        answer = {
            **self.head,
            "object": "chat.completion",
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "usage": self.generation.usage(),
            "system_fingerprint": None,
            "service_tier": None,
            "prompt_logprobs": prompt_logprobs(choices[0].prompt_logprobs),
            "kv_transfer_params": None,
        }
        if self.request.return_token_ids:
            answer["prompt_token_ids"] = self.generation.admitted[0].ids
        return answer

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        text = self.prefix + "".join(choice.text)
        answer = {
            "index": index,
            "message": {"role": self.role, "content": text, "refusal": None, "reasoning": None},
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self.request.return_token_ids:
            answer["token_ids"] = choice.token_ids
        return answer

    async def events(self) -> AsyncGenerator[bytes, None]:
        """A role chunk per choice, text as it comes, a chunk with the finish reason, usage if asked for."""
        options = self.request.stream_options
        include_usage = bool(options and options.include_usage)
        self.head["object"] = "chat.completion.chunk"
        running_usage = include_usage and bool(options and options.continuous_usage_stats)
        opened: set[int] = set()
        whole = running_usage or self.request.logprobs or self.request.return_token_ids
        envelopes = Envelopes(lambda index: {**self.head, "choices": [_text_choice(index, Envelopes.GAP)]})
        async with aclosing(self.generation.deltas()) as deltas:
            async for index, delta in deltas:
                if not whole and index in opened and delta.finish_reason is None:
                    if delta.text:
                        yield envelopes.event(index, delta.text)
                    continue
                for choice in self._chunks(index, delta, index not in opened):
                    chunk = {**self.head, "choices": [choice]}
                    if self.request.return_token_ids and not opened:
                        chunk["prompt_token_ids"] = self.generation.admitted[0].ids
                    if running_usage:
                        chunk["usage"] = self.generation.usage()
                    opened.add(index)
                    yield event(chunk)
        if include_usage:
            yield event({**self.head, "choices": [], "usage": self.generation.usage()})

    def _chunks(self, index: int, delta: Delta, first: bool) -> Iterable[dict[str, Any]]:
        if first:
            opening = {"role": self.role, "content": ""}
            yield {"index": index, "delta": opening, "logprobs": None, "finish_reason": None}
            if self.prefix:
                yield _text_choice(index, self.prefix)
        extras = delta.token_ids and (self.request.logprobs or self.request.return_token_ids)
        if delta.text or extras:
            chunk = _text_choice(index, delta.text) | {"logprobs": self._logprobs(delta.logprobs or ())}
            if self.request.return_token_ids:
                chunk["token_ids"] = list(delta.token_ids)
            yield chunk
        if delta.finish_reason is not None:
            end = {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
            yield {"index": index, "delta": {}, "logprobs": None, **end}

    def _logprobs(self, entries: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        if not self.request.logprobs:
            return None
        return chat_logprobs(entries, bool(self.request.return_tokens_as_token_ids))


def _text_choice(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}


def echoed(request: ChatRequest, role: str) -> str:
    """With ``echo``: the text of the last message, if the answer continues its role."""
    last = request.messages[-1]
    if not request.echo or last.role != role or last.content is None:
        return ""
    if isinstance(last.content, str):
        return last.content
    return "\n".join(part.text or part.refusal or "" for part in last.content)


def check_fields(request: ChatRequest, service: Service) -> None:
    request.refuse_unserved()
    check_control(request)
    check_tools(request)
    check_choices(service, 1, request.n)
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
    if request.stream and request.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs is not sent in a stream; leave out stream", "prompt_logprobs")


def check_tools(request: ChatRequest) -> None:
    """Tools may be shown to the template (tool_choice "none"); calls of them are not parsed yet."""
    if request.tool_choice not in (None, "none"):
        if request.tools:
            raise RequestError('tool calls are not supported by this server yet; use tool_choice "none"', "tool_choice")
        raise RequestError("tool_choice needs tools", "tool_choice")
    if request.tools and request.tool_choice is None:
        raise RequestError('tools are not supported by this server yet; use tool_choice "none"', "tools")


async def chat_completions(service: Service, exchange: Exchange) -> Response | None:
    request = await read(service, exchange, ChatRequest)
    work = await Chat.open(service, service.call(exchange, request), request)
    return await service.answer(exchange, work, request.stream)


ROUTES = (
    Route(
        "POST",
        "/v1/chat/completions",
        chat_completions,
        schemas.ChatAnswer,
        ChatRequest,
        (*BODY_ERRORS, 500, 503),
        streams=True,
    ),
)
