"""Offline inference in vLLM's shape: ``LLM(model).generate(prompts, SamplingParams(...))``.

It asks the same client as the server; an interrupt aborts what the call asked for, and leaves a working engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import count
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tuili.base.config import load
from tuili.base.errors import RequestError
from tuili.core.params import SamplingParams, listed, plain, shown
from tuili.engine.admission import Admitted, Asked, check_text
from tuili.engine.build import build
from tuili.engine.outputs import Choice, Completion, RequestMetrics, RequestOutput, logprobs_by_id
from tuili.engine.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
Params = SamplingParams | Iterable[SamplingParams | None] | None
Advance = Callable[[int, int], None]
#: Keys of a prompt that is a table, as in vLLM's TextPrompt and TokensPrompt.
KEYS = ("prompt", "prompt_token_ids", "cache_salt")
#: Prompts of one call.
MOST = 2**40


class LLM:
    """A model, loaded. ``options`` are those of Config (``max_model_len=...``); None or absent means auto.

    May be used by several threads; ``close`` it, use it in a ``with`` block, or let it go.
    """

    def __init__(self, model: str = "embedded", **options: Any):
        config = load(None, {"model": str(model), **options})
        with _loading() as progress:
            self.engine = build(config, progress)
        self._ids = count()

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        priority: Iterable[int] | None = None,
    ) -> list[RequestOutput]:
        """The completions of ``prompts``, in their order.

        A prompt is a text, a list of token ids, or ``{"prompt": ...}`` / ``{"prompt_token_ids": ...}``; it may have
        a ``cache_salt``. ``sampling_params`` is one for all or one for each; None takes the model's defaults.
        ``priority`` is one for each. ``use_tqdm`` shows progress on a terminal.
        Raises RequestError before anything runs when one of them is wrong, RequestFailed when one dies.
        """
        tables = [_table(prompt) for prompt in _listed(prompts)]
        params = self._params(sampling_params, len(tables))
        ranks = [0] * len(tables) if priority is None else listed("priority", priority, "integers", MOST)
        if len(ranks) != len(tables):
            raise RequestError(f"{len(tables)} prompts, but {len(ranks)} priorities", "priority")
        admitted = self.engine.admission.admit([self._ask(*each) for each in zip(tables, params, ranks, strict=True)])
        choices = [[Choice() for _ in each.requests] for each in admitted]
        with _generating(len(admitted), use_tqdm) as advance, closing(self.engine.run(admitted)) as deltas:
            left = [len(each) for each in choices]
            for number, delta in deltas:
                choices[number][delta.index].add(delta)
                left[number] -= delta.finish_reason is not None
                advance(int(delta.finish_reason is not None and not left[number]), len(delta.token_ids))
        texts = [table.get("prompt") for table in tables]
        return [_output(*each) for each in zip(texts, admitted, choices, strict=True)]

    def chat(
        self,
        messages: Iterable[Any],
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
        conversations = listed("messages", messages, "messages", MOST)
        if conversations and isinstance(conversations[0], Mapping):
            conversations = [conversations]
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
        default = self.get_default_sampling_params()
        if given is None or isinstance(given, SamplingParams):
            return [given or default] * number
        found = listed("sampling_params", given, "SamplingParams", MOST)
        each = [default if params is None else params for params in found]
        if len(each) != number:
            raise RequestError(f"{number} prompts, but {len(each)} sampling params; give one, or one for each")
        return each

    def _ask(self, table: Mapping[str, Any], params: SamplingParams, priority: int) -> Asked:
        text, ids = table.get("prompt"), table.get("prompt_token_ids")
        if isinstance(ids, str):
            raise RequestError(f"'prompt_token_ids' must be token ids, got {shown(ids)}", "prompt_token_ids")
        now, salt = self.engine.clock.now(), table.get("cache_salt")
        return Asked(text if ids is None else ids, params, str(next(self._ids)), now, priority, salt)  # type: ignore[arg-type]


def _listed(prompts: Any) -> list[Any]:
    """The prompts of a call: one alone (a text, a table, ids), or any iterable of them."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    found = listed("prompts", prompts, "prompts", MOST)
    return [found] if found and all(isinstance(plain(item), int) for item in found) else found


def _table(prompt: Any) -> Mapping[str, Any]:
    """A prompt in its longest form; RequestError for what is none, or asks for more than is known here."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if not isinstance(prompt, Mapping):
        return {"prompt_token_ids": prompt}
    given = {key: value for key, value in prompt.items() if value is not None}
    unknown = [str(key) for key in given if key not in KEYS]
    if unknown:
        raise RequestError(f"a prompt may have {', '.join(KEYS)}; {', '.join(unknown)} is not known here", unknown[0])
    if "prompt" not in given and "prompt_token_ids" not in given:
        raise RequestError(f"a prompt must have 'prompt' or 'prompt_token_ids', got {shown(prompt)}", "prompt")
    check_text(given.get("prompt", ""), "prompt")
    return given


def _output(prompt: str | None, admitted: Admitted, choices: Sequence[Choice]) -> RequestOutput:
    first, scored = choices[0], choices[0].prompt_logprobs
    return RequestOutput(
        request_id=admitted.id,
        prompt=prompt,
        prompt_token_ids=admitted.ids,
        outputs=[_completion(index, choice, admitted.params) for index, choice in enumerate(choices)],
        finished=all(choice.finish_reason is not None for choice in choices),
        prompt_logprobs=None
        if scored is None
        else [None if entry is None else logprobs_by_id(entry) for entry in scored],
        num_cached_tokens=first.usage.cached_tokens if first.usage else 0,
        usage=[choice.usage for choice in choices if choice.usage],
        metrics=_metrics(admitted.arrival, first),
    )


def _completion(index: int, choice: Choice, params: SamplingParams) -> Completion:
    asked = params.logprobs is not None
    return Completion(
        index=index,
        text="".join(choice.text),
        token_ids=choice.token_ids,
        cumulative_logprob=sum(entry.chosen.logprob for entry in choice.logprobs) if asked else None,
        logprobs=[logprobs_by_id(entry) for entry in choice.logprobs] if asked else None,
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
    )


def _metrics(arrival: float, choice: Choice) -> RequestMetrics | None:
    t = choice.timing
    if t is None:
        return None
    return RequestMetrics(arrival, t.queued, t.scheduled, t.first_token, t.last_token, len(choice.token_ids))


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
