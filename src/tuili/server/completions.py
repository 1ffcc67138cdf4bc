"""POST /v1/completions (interfaces.md 5.2): text or token ids in, text out, several prompts and choices at once."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import cache, partial
from typing import Any, cast

from tuili.base.errors import RequestError
from tuili.core.params import SamplingParams
from tuili.engine.admission import Admitted
from tuili.engine.outputs import Choice, Delta
from tuili.server import schemas
from tuili.server.body import read
from tuili.server.generation import Generation
from tuili.server.http import Exchange, Response
from tuili.server.inputs import asked, check_choices, check_control, sampling_params, truncated
from tuili.server.logprobs import CompletionLogprobs, Offsets, joined, prompt_logprobs
from tuili.server.protocol import CompletionRequest
from tuili.server.service import BODY_ERRORS, Call, Route, Service
from tuili.server.wire import Envelopes, event

#: Default of max_tokens, as in OpenAI's and vLLM's API.
MAX_TOKENS = 16


class Completions:
    """One request: checked and tokenized by ``open``, answered by ``answer()`` or ``events()``."""

    def __init__(self, service: Service, call: Call, request: CompletionRequest, prompts: list[tuple[str, Admitted]]):
        self.request = request
        self.prompts = prompts
        self.tokenizer = service.engine.tokenizer
        jobs = [job for _, job in prompts]
        self.generation = Generation(service.engine, service.metrics, jobs, prompt_only=request.max_tokens == 0)
        self.head: dict[str, Any] = {
            "id": f"cmpl-{call.id}",
            "object": "text_completion",
            "created": call.created,
            "model": call.model,
        }
        n = jobs[0].params.n
        self.writers = [Writer(self, echo, job) for echo, job in prompts for _ in range(n)]

    @classmethod
    async def open(cls, service: Service, call: Call, request: CompletionRequest) -> Completions:
        """Raises RequestError, with ``param``, for whatever the engine could not do as asked."""
        request.refuse_unserved()
        given = as_list(request.prompt)
        check_fields(request, service, len(given))
        ids = await encoded(request, service, given)
        kept = [truncated(each, request, service.engine, request.max_tokens or 1) for each in ids]
        params = cache(partial(make_params, service, request))  # one for all prompts of a limit
        wanted = [asked(call, request, each, params(limit(service, request, len(each)))) for each in kept]
        prompts = []
        for number, job in enumerate(await service.engine.admit(wanted)):
            prompt = given[number]
            whole = prompt if isinstance(prompt, str) and len(kept[number]) == len(ids[number]) else None
            prompts.append((echoed(request, service, job, whole), job))
        return cls(service, call, request, prompts)

    async def answer(self) -> dict[str, Any]:
        choices = await self.generation.choices()
        n = self.prompts[0][1].params.n
        scored = [choices[index - index % n].prompt_logprobs for index in range(len(choices))]
        written = [self.writers[index].whole(index, choice, scored[index]) for index, choice in enumerate(choices)]
        nulls = {"system_fingerprint": None, "service_tier": None, "kv_transfer_params": None}
        return {**self.head, "choices": written, "usage": self.generation.usage(), **nulls}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """A chunk per delta, the last of a choice with its finish reason, then usage if asked for."""
        options = self.request.stream_options
        include_usage = bool(options and options.include_usage)
        running_usage = include_usage and bool(options and options.continuous_usage_stats)
        whole = running_usage or self.request.logprobs is not None or self.request.return_token_ids
        envelopes = Envelopes(lambda index: {**self.head, "choices": [_text_choice(index, Envelopes.GAP)]})
        async with aclosing(self._deltas()) as deltas:
            async for index, delta in deltas:
                if not whole and self.writers[index].opened and delta.finish_reason is None:
                    if delta.text:
                        yield envelopes.event(index, delta.text)
                    continue
                choice = self.writers[index].chunk(index, delta)
                if choice is None:
                    continue
                chunk = {**self.head, "choices": [choice]}
                if running_usage:
                    chunk["usage"] = self.generation.usage()
                yield event(chunk)
        if include_usage:
            yield event({**self.head, "choices": [], "usage": self.generation.usage()})

    def _deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        scored = self.request.echo and self.request.logprobs is not None
        return self._scored_deltas() if scored else self.generation.deltas()

    async def _scored_deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """With echoed logprobs all choices of a prompt wait for the first one, which has them."""
        n = self.prompts[0][1].params.n
        waiting: dict[int, list[tuple[int, Delta]]] = {prompt: [] for prompt in range(len(self.prompts))}
        async with aclosing(self.generation.deltas()) as deltas:
            async for index, delta in deltas:
                prompt = index // n
                if prompt not in waiting:
                    yield index, delta
                elif index % n:
                    waiting[prompt].append((index, delta))
                else:
                    for other in range(index, index + n):
                        self.writers[other].scored = delta.prompt_logprobs
                    yield index, delta
                    for held in waiting.pop(prompt):
                        yield held


def _text_choice(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}


class Writer:
    """Writes one choice, whole or in chunks that add up to the same."""

    def __init__(self, completions: Completions, echo: str, job: Admitted):
        request = completions.request
        self.request = request
        self.echo = echo
        self.job = job
        self.opened = False
        #: Logprobs of the prompt, for ``echo``; set before the first piece.
        self.scored: Any = None
        hidden = completions.tokenizer.special_ids if job.params.skip_special_tokens else frozenset[int]()
        begun = not request.echo and any(id not in hidden for id in job.ids)
        offsets = Offsets(completions.tokenizer, hidden, begun)
        self.logprobs = CompletionLogprobs(offsets, bool(request.return_tokens_as_token_ids))

    def whole(self, index: int, choice: Choice, scored: Any) -> dict[str, Any]:
        self.scored = scored
        end = choice.finish_reason, choice.stop_reason
        written = self._piece(index, "".join(choice.text), choice.token_ids, choice.logprobs, *end)
        asked = self.request.prompt_logprobs is not None
        written["prompt_logprobs"] = prompt_logprobs(scored) if asked else None
        return written

    def chunk(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """None where the delta brings nothing that the client asked for."""
        extras = delta.token_ids and (self.request.logprobs is not None or self.request.return_token_ids)
        first = not self.opened and self.request.echo
        if not (delta.text or extras or first or delta.finish_reason is not None):
            return None
        end = delta.finish_reason, delta.stop_reason
        return self._piece(index, delta.text, list(delta.token_ids), delta.logprobs or (), *end)

    def _piece(
        self, index: int, text: str, token_ids: list[int], entries: Any, finish: str | None, stop: int | str | None
    ) -> dict[str, Any]:
        logprobs = None
        first, self.opened = not self.opened, True
        if self.request.logprobs is not None:
            opening = (
                self.logprobs.prompt(self.job.ids[0], self.scored or (), self.echo)
                if first and self.request.echo
                else None
            )
            logprobs = self.logprobs.piece(entries)
            logprobs = joined(opening, logprobs) if opening else logprobs
        piece = _text_choice(index, self.echo + text if first else text)
        piece |= {"logprobs": logprobs, "finish_reason": finish, "stop_reason": stop}
        if self.request.return_token_ids:
            piece["token_ids"] = token_ids
            piece["prompt_token_ids"] = self.job.ids if first else None
        return piece


def as_list(prompt: Any) -> list[str | list[int]]:
    """One or several prompts, each text or token ids."""
    if prompt == []:
        raise RequestError("prompt is an empty list; send text, token ids, or a list of one of them", "prompt")
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [cast("str | list[int]", prompt)]
    return prompt


async def encoded(request: CompletionRequest, service: Service, given: list[str | list[int]]) -> list[list[int]]:
    """Token ids of each prompt."""
    texts = [prompt for prompt in given if isinstance(prompt, str)]
    fits, special = request.truncate_prompt_tokens is None, request.add_special_tokens is not False
    found = iter(await service.engine.encode(texts, special, fits=fits))
    return [next(found) if isinstance(prompt, str) else prompt for prompt in given]


def check_fields(request: CompletionRequest, service: Service, prompts: int) -> None:
    check_control(request)
    check_choices(service, prompts, request.n)
    if request.stream and request.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs is not sent in a stream; leave out stream", "prompt_logprobs")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise RequestError("best_of is not supported by this server yet; leave it out, or set it to n", "best_of")
    if request.max_tokens == 0 and not request.echo:
        raise RequestError("max_tokens must be at least 1, or 0 with echo", "max_tokens")


def limit(service: Service, request: CompletionRequest, prompt_len: int) -> int | None:
    """The request's ``max_tokens``; the prompt alone (0) takes one, and what is left out must fit."""
    if "max_tokens" not in request.model_fields_set:
        return max(1, min(MAX_TOKENS, service.engine.max_model_len - prompt_len))
    return 1 if request.max_tokens == 0 else request.max_tokens


def make_params(service: Service, request: CompletionRequest, max_tokens: int | None) -> SamplingParams:
    params = sampling_params(request, service.engine, max_tokens, request.logprobs)
    if request.echo and request.logprobs is not None and params.prompt_logprobs is None:
        return params.with_(prompt_logprobs=request.logprobs)
    return params


def echoed(request: CompletionRequest, service: Service, job: Admitted, text: str | None) -> str:
    """With ``echo``: the prompt, as the user wrote it where that is known and whole."""
    if not request.echo:
        return ""
    return service.engine.tokenizer.decode(job.ids, job.params.skip_special_tokens) if text is None else text


async def completions(service: Service, exchange: Exchange) -> Response | None:
    request = await read(service, exchange, CompletionRequest)
    work = await Completions.open(service, service.call(exchange, request), request)
    return await service.answer(exchange, work, request.stream)


ROUTES = (
    Route(
        "POST",
        "/v1/completions",
        completions,
        schemas.CompletionAnswer,
        CompletionRequest,
        (*BODY_ERRORS, 500, 503),
        streams=True,
    ),
)
