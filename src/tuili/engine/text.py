"""Text in, text out: tokenizer, chat template, stop strings and metrics around an engine that knows token ids only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jinja2

from tuili.base.clock import Clock
from tuili.base.config import Config
from tuili.base.errors import OverloadedError, RequestError, RequestFailed, TuiliError
from tuili.base.log import get
from tuili.core.params import SamplingParams
from tuili.core.request import FinishReason, Request, Update
from tuili.engine.chat import ChatTemplate, Messages, compiled
from tuili.engine.client import EngineClient, Stream
from tuili.engine.engine import Listener, Snapshot
from tuili.engine.generation_config import GenerationDefaults
from tuili.engine.outputs import Delta, Finished
from tuili.engine.prepare import Limits, Seeds, engine_requests
from tuili.engine.tokenizer import Tokenizer
from tuili.engine.transcript import Transcript, transcripts

log = get(__name__)
#: Prompts longer than this (characters) are tokenised in another thread, so that the others' streams go on.
LONG_PROMPT = 20_000


class TextEngine:
    """What servers and commands talk to. ``config`` is resolved; ``templates`` finds the model's chat template (its
    source) for requests with and without tools."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        config: Config,
        limits: Limits,
        defaults: GenerationDefaults | None = None,
        templates: Callable[[bool], str | None] = lambda tools: None,
    ):
        self.client = client
        self.tokenizer = tokenizer
        self.config = config
        self.limits = limits
        self.defaults = defaults or GenerationDefaults()
        self.model_name = config.served_model_name or config.model
        self.max_model_len = limits.max_model_len
        self.eos_token_ids = limits.eos_token_ids
        self.sampling_defaults: dict[str, Any] = dict(self.defaults.values)
        self.sampling_sources: dict[str, str] = dict(self.defaults.sources)
        self.clock: Clock = client.engine.clock
        self.on_step: list[Listener] = client.engine.listeners
        self.on_finish: list[Callable[[Finished], None]] = []
        self._templates = templates
        self._seeds = Seeds(config.seed)

    # ------------------------------------------------------------------------------------------------------ generation

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str = "",
        arrival: float | None = None,
        add_special_tokens: bool = True,
    ) -> AsyncIterator[Delta]:
        """The output piece by piece; the pieces of ``params.n`` choices interleave.

        Raises before the first piece RequestError, OverloadedError or EngineDead; later RequestFailed or EngineDead.
        Closing the iterator (or cancelling its consumer) aborts what still runs.
        """
        arrival = self.clock.now() if arrival is None else arrival
        if isinstance(prompt, str) and len(prompt) > LONG_PROMPT:
            prompt = await asyncio.to_thread(self.tokenizer.encode, prompt, add_special_tokens)
        requests = self.prepare(prompt, params, request_id, priority, cache_salt, add_special_tokens)
        choices = transcripts(requests, self.tokenizer)
        stream = self.client.generate(requests)
        left = FinishReason.ABORT
        try:
            async for update in stream:
                delta = self._read(update, choices[update.id], stream, arrival)
                if delta is not None:
                    yield delta
        except (RequestError, OverloadedError):  # none was accepted
            choices.clear()
            raise
        except TuiliError:
            left = FinishReason.ERROR
            raise
        except Exception as error:
            left = FinishReason.ERROR
            log.exception("request %s failed outside of the engine", request_id)
            raise RequestFailed(f"request {request_id} failed: {type(error).__name__}: {error}") from error
        finally:
            stream.close()
            for choice in choices.values():
                if not choice.done:
                    self.finished(choice, left, arrival)

    def _read(self, update: Update, choice: Transcript, stream: Stream, arrival: float) -> Delta | None:
        if update.finish is FinishReason.ERROR:
            raise RequestFailed(f"request {update.id} failed: {update.error}")
        delta = choice.push(update)
        if choice.stopped:
            stream.abort(update.id)
        if delta is not None and delta.finish_reason is not None:
            self.finished(choice, delta.finish_reason, arrival)
        return delta

    def prepare(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        request_id: str,
        priority: int = 0,
        cache_salt: str = "",
        add_special_tokens: bool = True,
    ) -> list[Request]:
        """The engine requests of one call, checked and complete. RequestError names the field that is wrong."""
        tokens = self.tokenizer.encode(prompt, add_special_tokens) if isinstance(prompt, str) else prompt
        return engine_requests(
            request_id,
            tokens,
            params,
            limits=self.limits,
            tokenizer=self.tokenizer,
            seeds=self._seeds,
            priority=priority,
            salt=cache_salt,
        )

    def finished(self, choice: Transcript, reason: str, arrival: float) -> None:
        """Tell ``on_finish`` that an engine request ended."""
        record = Finished(
            choice.request.id,
            choice.request.params,
            choice.usage,
            str(reason),
            arrival,
            self.clock.now(),
            replace(choice.timing),
            choice.request.preemptions,
        )
        for listener in self.on_finish:
            try:
                listener(record)
            except Exception:  # a broken metric must not end anyone's request
                log.exception("a listener failed for request %s", record.id)

    def default_params(self, **given: Any) -> SamplingParams:
        """The model's defaults, overridden by what is given and not None."""
        return SamplingParams(**{**self.defaults.sampling(), **{k: v for k, v in given.items() if v is not None}})

    # ------------------------------------------------------------------------------------------------------------ chat

    def encode_chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Messages to token ids by ``chat_template`` (text) or the model's own.

        RequestError when there is none, or when it does not take these messages.
        """
        text = self._template(chat_template, bool(tools)).render(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            special_tokens=self.tokenizer.special_tokens,
            kwargs=kwargs,
        )
        return self.tokenizer.encode(text, add_special_tokens)

    def _template(self, given: str | None, tools: bool) -> ChatTemplate:
        source = given if given is not None else self._templates(tools)
        if source is None:
            raise RequestError(
                f"model {self.model_name!r} has no chat template; use completions, send chat_template along, or "
                "start with --chat-template FILE",
                "messages",
            )
        try:
            return compiled(source)
        except jinja2.TemplateError as error:
            param = "messages" if given is None else "chat_template"
            raise RequestError(f"the chat template is not valid Jinja: {error}", param) from error

    # ------------------------------------------------------------------------------------------------------- the engine

    def snapshot(self) -> Snapshot:
        return self.client.engine.snapshot()

    def healthy(self) -> bool:
        """False once the engine is dead or closed: every request from then on raises EngineDead."""
        return self.client.engine.dead is None

    def close(self) -> None:
        """Stop the engine and free its memory; what still runs ends in EngineClosed. Safe to call twice."""
        self.client.close()
