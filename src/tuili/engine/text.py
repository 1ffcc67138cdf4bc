"""Text in, text out: tokenizer, chat template, stop strings and metrics around an engine that knows token ids only."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Mapping, Sequence, Sized
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import jinja2

from tuili.base.clock import Clock
from tuili.base.config import Config
from tuili.base.errors import OverloadedError, RequestError, RequestFailed, TuiliError
from tuili.base.log import get
from tuili.core.params import SamplingParams
from tuili.core.request import FinishReason, Update
from tuili.engine.admission import Admission, Admitted, Asked, Bounds
from tuili.engine.chat import ChatTemplate, Messages, compiled
from tuili.engine.client import EngineClient, Stream
from tuili.engine.engine import Listener, Snapshot
from tuili.engine.generation_config import GenerationDefaults
from tuili.engine.outputs import Delta, Finished
from tuili.engine.tokenizer import LONG_TEXT, Tokenizer
from tuili.engine.transcript import Transcript

log = get(__name__)


class TextEngine:
    """What servers and commands talk to. ``config`` is resolved; ``templates`` finds the model's chat template (its
    source) for requests with and without tools. The engine is closed with its last user, or when the process ends."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        config: Config,
        bounds: Bounds,
        defaults: GenerationDefaults | None = None,
        templates: Callable[[bool], str | None] = lambda tools: None,
    ):
        self.client = client
        self.tokenizer = tokenizer
        self.config = config
        self.bounds = bounds
        self.admission = Admission(tokenizer, bounds, config.seed)
        self.defaults = defaults or GenerationDefaults()
        self.model_name = config.served_model_name or config.model
        self.max_model_len = bounds.max_model_len
        self.eos_token_ids = bounds.eos_token_ids
        self.sampling_defaults: dict[str, Any] = dict(self.defaults.values)
        self.sampling_sources: dict[str, str] = dict(self.defaults.sources)
        self.clock: Clock = client.clock
        self.on_step: list[Listener] = client.listeners
        self.on_finish: list[Callable[[Finished], None]] = []
        self._templates = templates
        weakref.finalize(self, client.close)

    # ------------------------------------------------------------------------------------------------------ generation

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str = "",
        tenant: str = "",
        session: str = "",
        arrival: float | None = None,
        add_special_tokens: bool = True,
    ) -> AsyncIterator[Delta]:
        """The output piece by piece; the pieces of ``params.n`` choices interleave.

        Raises before the first piece RequestError, OverloadedError or EngineDead; later RequestFailed or EngineDead.
        Closing the iterator (or cancelling its consumer) aborts what still runs.
        """
        arrival = self.clock.now() if arrival is None else arrival
        asked = Asked(prompt, params, request_id, arrival, priority, cache_salt or None, tenant, session)
        admitted = await self.admit([asked], add_special_tokens)
        async with aclosing(self.stream(admitted)) as deltas:
            async for _, delta in deltas:
                yield delta

    async def admit(self, asked: Sequence[Asked], add_special_tokens: bool = True) -> list[Admitted]:
        """What ``Admission.admit`` says; what takes long does not stop the loop."""
        if sum(len(each.prompt) for each in asked if isinstance(each.prompt, Sized)) <= LONG_TEXT:
            return self.admission.admit(asked, add_special_tokens)
        return await asyncio.to_thread(self.admission.admit, asked, add_special_tokens)

    async def encode(
        self, texts: Sequence[str], add_special_tokens: bool = True, param: str = "prompt", fits: bool = True
    ) -> list[list[int]]:
        """What ``Admission.encode`` says; long texts do not stop the loop."""
        if sum(map(len, texts)) <= LONG_TEXT:
            return self.admission.encode(texts, add_special_tokens, param, fits)
        return await asyncio.to_thread(self.admission.encode, texts, add_special_tokens, param, fits)

    async def stream(self, admitted: Sequence[Admitted]) -> AsyncGenerator[tuple[int, Delta], None]:
        """The deltas of all that one call asks for, each with its place in ``admitted``. All are accepted, or none."""
        stream = self.client.generate([])
        with Reading(self, stream) as reading:
            reading.add(admitted)
            async for update in stream:
                if (found := reading.read(update)) is not None:
                    yield found

    def run(self, admitted: Sequence[Admitted]) -> Generator[tuple[int, Delta], None, None]:
        """As ``stream``, for a thread that waits. No more is asked of the engine at a time than it may queue, so that
        any number gets done. Close the iterator to abort what still runs."""
        waiting, most = deque(admitted), self.bounds.max_requests
        stream = self.client.read()
        with Reading(self, stream) as reading:
            while waiting or stream.num_open:
                batch: list[Admitted] = []
                room = sum(len(each.requests) for each in waiting) if most is None else most - stream.num_open
                while waiting and (room := room - len(waiting[0].requests)) >= 0:
                    batch.append(waiting.popleft())
                if batch:
                    reading.add(batch)
                update = next(stream, None)
                if update is not None and (found := reading.read(update)) is not None:
                    yield found

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
        fits: bool = True,
    ) -> list[int]:
        """Messages to token ids by ``chat_template`` (text) or the model's own.

        RequestError when there is none, when it does not take these messages, or when the result is longer than the
        context; ``fits`` False lets it be.
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
        return self.admission.encode([text], add_special_tokens, "messages", fits)[0]

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
        return self.client.snapshot()

    def healthy(self) -> bool:
        """False once the engine is dead or closed: every request from then on raises EngineDead."""
        return self.client.healthy()

    def close(self) -> None:
        """Stop the engine and free its memory; what still runs ends in EngineClosed. Safe to call twice."""
        self.client.close()


class Reading:
    """One call being read: updates of its requests become deltas; each request leaves one record when it ends.

    Leaving the block aborts what still runs. An exception that is no TuiliError becomes RequestFailed.
    """

    def __init__(self, text: TextEngine, stream: Stream):
        self._text = text
        self._stream = stream
        self._count = 0
        self._open: dict[str, tuple[int, Admitted, Transcript]] = {}
        self._begun = False

    def add(self, admitted: Sequence[Admitted]) -> None:
        for number, each in enumerate(admitted, self._count):
            for index, request in enumerate(each.requests):
                self._open[request.id] = number, each, Transcript(request, self._text.tokenizer, index)
        self._count += len(admitted)
        self._stream.add([request for each in admitted for request in each.requests])

    def read(self, update: Update) -> tuple[int, Delta] | None:
        """The delta of an update and its place in the call, or None while there is nothing to tell."""
        if update.finish is FinishReason.ERROR:
            raise RequestFailed(f"request {update.id} failed: {update.error}")
        self._begun = True
        number, _, choice = self._open[update.id]
        delta = choice.push(update)
        if choice.stopped:
            self._stream.abort(update.id)
        if delta is None:
            return None
        if delta.finish_reason is not None:
            self._finish(update.id, delta.finish_reason)
        return number, delta

    def _finish(self, id: str, reason: str) -> None:
        _, admitted, choice = self._open.pop(id)
        request = choice.request
        record = Finished(
            id,
            request.params,
            choice.usage,
            str(reason),
            admitted.arrival,
            self._text.clock.now(),
            replace(choice.timing),
            choice.preemptions,
            request.tenant,
            request.session,
        )
        for listener in self._text.on_finish:
            try:
                listener(record)
            except Exception:  # a broken metric must not end anyone's request
                log.exception("a listener failed for request %s", record.id)

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._stream.close()
        if isinstance(error, (RequestError, OverloadedError)) and not self._begun:  # none was accepted
            return
        reason = FinishReason.ERROR if isinstance(error, Exception) else FinishReason.ABORT
        name = next(iter(self._open), "")
        for id in list(self._open):
            self._finish(id, reason)
        if isinstance(error, Exception) and not isinstance(error, TuiliError):
            log.error("request %s failed outside of the engine", name, exc_info=error)
            raise RequestFailed(f"request {name} failed: {type(error).__name__}: {error}") from error
