"""Offline inference in vLLM's shape: ``LLM(model).generate(prompts, SamplingParams(...))``.

The engine runs in the caller's thread, so that an interrupt stops it at once and leaves nothing behind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tuili.base.config import load
from tuili.base.errors import OverloadedError, RequestError, RequestFailed
from tuili.core.params import SamplingParams
from tuili.core.request import FinishReason, Request, Update
from tuili.engine.build import build
from tuili.engine.client import InlineClient
from tuili.engine.outputs import Completion, Delta, RequestOutput, TokenLogprob
from tuili.engine.tokenizer import Tokenizer
from tuili.engine.transcript import Transcript

Prompt = str | Sequence[int] | Mapping[str, Any]
Params = SamplingParams | Sequence[SamplingParams] | None
Advance = Callable[[int, int], None]


class LLM:
    """A model, loaded. ``options`` are those of Config (``max_model_len=...``); None or absent means auto.

    Not for several threads at once; a server wants ``engine.build`` instead.
    """

    def __init__(self, model: str = "embedded", **options: Any):
        config = load(None, {"model": str(model), **options})
        with _loading() as progress:
            self.engine = build(config, progress, InlineClient)
        self._ids = count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """The completions of ``prompts``, in their order.

        A prompt is a text, a list of token ids, or ``{"prompt": ...}`` / ``{"prompt_token_ids": ...}``.
        ``sampling_params`` is one for all or one for each; None takes the model's defaults. ``use_tqdm`` shows progress
        on a terminal.
        Raises RequestError before anything runs when one of them is wrong, RequestFailed when one dies.
        """
        listed = _listed(prompts)
        params = self._params(sampling_params, len(listed))
        ranks = list(priority) if priority is not None else [0] * len(listed)
        if len(ranks) != len(listed):
            raise RequestError(f"{len(listed)} prompts, but {len(ranks)} priorities", "priority")
        jobs = [self._job(*each) for each in zip(listed, params, ranks, strict=True)]
        with _generating(len(jobs), use_tqdm) as advance:
            self._run(jobs, advance)
        return [job.output() for job in jobs]

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Like ``generate``, for one conversation (a list of messages) or a list of them."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [
            self.engine.encode_chat(
                conversation,
                tools=tools,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                kwargs=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm)

    def get_tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What None as ``sampling_params`` means: the model's generation config; 16 tokens where it sets no limit."""
        return self.engine.default_params()

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _params(self, given: Params, number: int) -> list[SamplingParams]:
        if given is None or isinstance(given, SamplingParams):
            return [given or self.get_default_sampling_params()] * number
        if len(given) != number:
            raise RequestError(f"{number} prompts, but {len(given)} sampling params; give one, or one for each")
        return list(given)

    def _job(self, prompt: Prompt, params: SamplingParams, priority: int) -> _Job:
        text, ids = _parts(prompt)
        name = str(next(self._ids))
        requests = self.engine.prepare(text if ids is None else ids, params, name, priority)  # type: ignore[arg-type]
        return _Job(name, text, requests, self.engine.tokenizer, self.engine.clock.now())

    def _run(self, jobs: Sequence[_Job], advance: Advance) -> None:
        """Step the engine until all jobs are done; whatever stops it, nothing of them stays behind."""
        engine = self.engine.client.engine
        running: dict[str, _Job] = {}
        waiting = deque((job, request) for job in jobs for request in job.requests)
        try:
            while waiting or running:
                self._submit(waiting, running)
                for update in engine.step():
                    self._take(running, update, advance)
        finally:
            for id in running:
                engine.abort(id)

    def _submit(self, waiting: deque[tuple[_Job, Request]], running: dict[str, _Job]) -> None:
        engine = self.engine.client.engine
        while waiting:
            job, request = waiting[0]
            try:
                engine.add(request)
            except OverloadedError:
                if not engine.has_work:
                    raise
                return
            running[request.id] = job
            waiting.popleft()

    def _take(self, running: dict[str, _Job], update: Update, advance: Advance) -> None:
        job = running[update.id]
        if update.finish is FinishReason.ERROR:
            del running[update.id]
            raise RequestFailed(f"request {update.id} failed: {update.error}")
        choice = job.push(update)
        if choice.done:
            del running[update.id]
            if choice.stopped:
                self.engine.client.engine.abort(update.id)
            self.engine.finished(choice, job.reasons[choice.index], job.arrival)
        advance(int(choice.done and job.done), len(update.tokens))


class _Job:
    """One prompt on its way: its choices, and what they said so far."""

    def __init__(self, name: str, prompt: str | None, requests: list[Request], tokenizer: Tokenizer, arrival: float):
        self.name = name
        self.prompt = prompt
        self.requests = requests
        self.arrival = arrival
        self.choices = [Transcript(request, tokenizer, index) for index, request in enumerate(requests)]
        self.reasons = [""] * len(requests)
        self._deltas: list[list[Delta]] = [[] for _ in requests]
        self._by_id = {choice.request.id: choice for choice in self.choices}

    def push(self, update: Update) -> Transcript:
        choice = self._by_id[update.id]
        delta = choice.push(update)
        if delta is not None:
            self._deltas[choice.index].append(delta)
            self.reasons[choice.index] = delta.finish_reason or ""
        return choice

    @property
    def done(self) -> bool:
        return all(choice.done for choice in self.choices)

    def output(self) -> RequestOutput:
        first = self.choices[0]
        prompt_logprobs = next((d.prompt_logprobs for d in self._deltas[0] if d.prompt_logprobs is not None), None)
        return RequestOutput(
            request_id=self.name,
            prompt=self.prompt,
            prompt_token_ids=list(first.request.tokens[: first.request.prompt_len]),
            outputs=[_completion(index, deltas) for index, deltas in enumerate(self._deltas)],
            finished=self.done,
            prompt_logprobs=None if prompt_logprobs is None else list(prompt_logprobs),
            num_cached_tokens=first.cached,
            usage=[choice.usage for choice in self.choices],
        )


def _completion(index: int, deltas: Sequence[Delta]) -> Completion:
    asked = deltas[-1].logprobs is not None
    logprobs: list[TokenLogprob] = [entry for delta in deltas for entry in delta.logprobs or ()]
    return Completion(
        index=index,
        text="".join(delta.text for delta in deltas),
        token_ids=[id for delta in deltas for id in delta.token_ids],
        cumulative_logprob=sum(entry.chosen.logprob for entry in logprobs) if asked else None,
        logprobs=logprobs if asked else None,
        finish_reason=deltas[-1].finish_reason,
        stop_reason=deltas[-1].stop_reason,
    )


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _parts(prompt: Prompt) -> tuple[str | None, list[int] | None]:
    """The prompt's text and its ids, where given."""
    if isinstance(prompt, str):
        return prompt, None
    if not isinstance(prompt, Mapping):
        return None, list(prompt)
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is None and ids is None:
        raise RequestError(f"a prompt must have 'prompt' or 'prompt_token_ids', got {sorted(prompt)}", "prompt")
    return text, None if ids is None else list(ids)


@contextmanager
def _loading() -> Iterator[Callable[[str, int, int], None] | None]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with Progress(TextColumn("Loading weights"), BarColumn(), DownloadColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _generating(number: int, shown: bool) -> Iterator[Advance]:
    """Counts finished prompts and generated tokens, on a terminal."""
    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield lambda prompts, tokens: None
        return
    columns = (TextColumn("Generating"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=number, rate="")
        made = 0

        def advance(prompts: int, tokens: int) -> None:
            nonlocal made
            made += tokens
            elapsed = bar.tasks[0].elapsed or 0.0
            bar.update(task, advance=prompts, rate=f"{made / elapsed:,.0f} tokens/s" if elapsed else "")

        yield advance
