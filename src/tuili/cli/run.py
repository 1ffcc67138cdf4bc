"""``tuili run MODEL``: chat in the terminal, or one answer for ``--prompt`` or standard input."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuili.base import log
from tuili.base.errors import ConfigError, RequestError
from tuili.cli.options import ENGINE_GROUPS, Settings, takes_config
from tuili.cli.progress import loading
from tuili.cli.wrap import WordWrap

if TYPE_CHECKING:
    import asyncio

    from tuili.core.params import SamplingParams
    from tuili.engine.text import TextEngine

app = typer.Typer(add_completion=False)

HELP = """\
/system TEXT   set the system prompt (without TEXT: show it); starts a new conversation
/reset         forget the conversation
/exit          leave (Ctrl-D too)
Ctrl-C         stop the answer"""

#: Tokens kept free for the answer when old turns are dropped to make room: a quarter of the context, at most this many.
ANSWER_ROOM = 256


@app.command()
@takes_config(*ENGINE_GROUPS)
def run(
    settings: Settings,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Answer this and leave; '-' reads stdin.", show_default="chat"),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.", show_default=False)] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")] = False,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", show_default="model's")] = None,
    top_p: Annotated[float | None, typer.Option(help="Least set of this probability.", show_default="model's")] = None,
    top_k: Annotated[int | None, typer.Option(help="Most likely tokens only; 0: all.", show_default="model's")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer.", show_default="fill the context")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer.", show_default="drawn")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout; needs a prompt.")] = False,
) -> None:
    """Chat with MODEL in the terminal; with --prompt, or text on standard input, answer once and leave."""
    log.setup(default="ERROR")
    if sys.stdout is None:
        raise ConfigError("standard output is closed, and the answer has to go somewhere")
    text = _one_shot_text(prompt, json_output)
    system = system and _text(system, "--system")
    given: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
    began = time.perf_counter()
    with loading() as progress:
        from tuili.engine.build import build

        engine = build(settings.config, progress)
    try:
        params = engine.default_params(**given, max_tokens=max_tokens)
        if max_tokens is None:  # the model's own limit, if it has one, else the end of the context
            params = params.with_(max_tokens=None)
        session = Session(engine, params, system=system, raw=raw)
        if text is None:
            _chat(session)
        else:
            _once(session, text, json_output, time.perf_counter() - began)
    finally:
        engine.close()


def _one_shot_text(prompt: str | None, json_output: bool) -> str | None:
    """The one prompt to answer, or None for a chat."""
    if prompt == "-" or (prompt is None and not (sys.stdin and sys.stdin.isatty())):
        prompt = _standard_input()
        if not prompt.strip():
            raise typer.BadParameter("standard input is empty; give the text there or with --prompt TEXT")
    if prompt is None and json_output:
        raise typer.BadParameter("--json answers one prompt: give it with --prompt TEXT or on standard input")
    if prompt is not None and not prompt:
        raise typer.BadParameter("the prompt is empty")
    return prompt and _text(prompt, "--prompt")


def _standard_input() -> str:
    """All of it but the newline at its end, which is the shell's; nothing where it is closed."""
    if sys.stdin is None:
        return ""
    try:
        return _text(sys.stdin.buffer.read(), "standard input").removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise ConfigError(f"cannot read standard input: {error.strerror}") from error


def _text(given: bytes | str, name: str) -> str:
    """The bytes as text, or the text if it was read from UTF-8; else ConfigError, which calls it ``name``."""
    try:
        raw = given if isinstance(given, bytes) else given.encode()
        return raw.decode()
    except (UnicodeEncodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} is not UTF-8 ({error.reason} at {error.start}); convert it, as iconv does") from None


@dataclass(slots=True)
class PrintedAnswer:
    """An answer as far as it came: Ctrl-C keeps what is there. Seconds."""

    prompt_tokens: int
    text: str = ""
    output_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str = "abort"
    ttft: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of the decode: tokens after the first, by the time after the first."""
        decode = self.seconds - self.ttft
        return (self.output_tokens - 1) / decode if self.output_tokens > 1 and decode > 0 else 0.0


@dataclass
class Session:
    """A conversation with one engine, on one asyncio loop."""

    engine: TextEngine
    params: SamplingParams
    system: str | None = None
    raw: bool = False
    turns: list[dict[str, str]] = field(default_factory=list)
    answers: int = 0
    dropped: int = 0

    def prompt(self, text: str) -> str | list[int]:
        """What the model reads for ``text``: the text itself if raw, else the conversation through the template.

        The oldest turns are dropped when the conversation leaves no room for an answer.
        """
        if self.raw:
            return text
        self.turns.append({"role": "user", "content": text})
        room = min(self.params.max_tokens or ANSWER_ROOM, ANSWER_ROOM, self.engine.max_model_len // 4)
        while True:
            opening = [{"role": "system", "content": self.system}] if self.system else []
            ids = self.engine.encode_chat(opening + self.turns)
            if len(ids) + room <= self.engine.max_model_len or len(self.turns) < 3:
                return ids
            del self.turns[:2]
            self.dropped += 1

    async def answer(self, text: str, answer: PrintedAnswer, show: Any) -> None:
        """Generate into ``answer``, calling ``show(piece)`` for each new piece of text."""
        prompt = self.prompt(text)
        self.answers += 1
        began = time.perf_counter()
        try:
            stream = self.engine.generate(prompt, self.params, request_id=f"run-{self.answers}")
            async for delta in stream:
                if answer.ttft == 0.0:
                    answer.ttft = time.perf_counter() - began
                answer.text += delta.text
                answer.output_tokens += len(delta.token_ids)
                show(delta.text)
                if delta.usage is not None:
                    answer.prompt_tokens, answer.cached_tokens = delta.usage.prompt_tokens, delta.usage.cached_tokens
                    answer.finish_reason = delta.finish_reason or "abort"
        finally:
            answer.seconds = time.perf_counter() - began

    def remember(self, answer: PrintedAnswer) -> None:
        """Keep an answer, or a part of it that was stopped; forget a question that got none."""
        if self.raw:
            return
        if answer.text:
            self.turns.append({"role": "assistant", "content": answer.text})
        elif self.turns:
            self.turns.pop()


def _once(session: Session, text: str, json_output: bool, load_seconds: float) -> None:
    import asyncio

    answer = PrintedAnswer(prompt_tokens=0)
    try:
        with nullcontext(_nothing) if json_output else _screen() as show:
            asyncio.run(session.answer(text, answer, show))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        raise typer.Exit(130) from None
    if json_output:
        print(json.dumps(_as_json(session, answer, load_seconds), ensure_ascii=False))
    else:
        print()
        _dim(_speed(answer))


def _as_json(session: Session, answer: PrintedAnswer, load_seconds: float) -> dict[str, Any]:
    return {
        "model": session.engine.model_name,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.output_tokens,
            "total_tokens": answer.prompt_tokens + answer.output_tokens,
            "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
        },
        "timings": {
            "load_seconds": load_seconds,
            "ttft_seconds": answer.ttft,
            "total_seconds": answer.seconds,
            "tokens_per_second": answer.tokens_per_second,
        },
    }


def _chat(session: Session) -> None:
    import asyncio

    with suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    _dim(f"{session.engine.model_name}, {session.engine.max_model_len} tokens of context. /help lists the commands.")
    with asyncio.Runner() as runner:
        while (line := _ask()) is not None:
            if not line.strip():
                continue
            if line.startswith("/"):
                if not _command(session, line):
                    return
                continue
            _turn(session, runner, line)


def _ask() -> str | None:
    """A line, or None at the end of the input (Ctrl-D). Ctrl-C drops the line, and what is no UTF-8 is refused."""
    try:
        return _text(input("> "), "the line")
    except (ConfigError, UnicodeDecodeError) as error:
        print(f"tuili: {error}", file=sys.stderr)
        return ""
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        return ""


def _turn(session: Session, runner: asyncio.Runner, line: str) -> None:
    answer, dropped = PrintedAnswer(prompt_tokens=0), session.dropped
    try:
        with _screen() as show:
            runner.run(session.answer(line, answer, show))
    except KeyboardInterrupt:
        pass
    except RequestError as error:
        print(f"tuili: {error}", file=sys.stderr)
    print()
    session.remember(answer)
    if session.dropped > dropped:
        _dim(f"(the conversation is longer than the context: {session.dropped} old turns are forgotten)")
    _dim(_speed(answer))


def _command(session: Session, line: str) -> bool:
    """Do a /command; False to leave."""
    name, _, rest = line.partition(" ")
    if name in ("/exit", "/quit"):
        return False
    if name == "/reset":
        session.turns.clear()
        _dim("(new conversation)")
    elif name == "/system":
        if rest.strip():
            session.system = rest.strip()
            session.turns.clear()
        _dim(f"(system prompt: {session.system or 'none'})")
    else:
        if name != "/help":
            print(f"unknown command {name}", file=sys.stderr)
        print(HELP, file=sys.stderr)
    return True


@contextmanager
def _screen() -> Iterator[Callable[[str], None]]:
    """Shows pieces of text as they come; on a terminal, with line breaks between words."""

    show = partial(print, end="", flush=True)
    if not (sys.stdout and sys.stdout.isatty()):
        yield show
        return
    wrap = WordWrap(lambda: shutil.get_terminal_size().columns)
    try:
        yield lambda piece: show(wrap.feed(piece))
    finally:
        show(wrap.end())


def _nothing(piece: str) -> None:
    pass


def _speed(answer: PrintedAnswer) -> str:
    if not answer.output_tokens:
        return "(nothing generated)"
    rate = f", {answer.tokens_per_second:.1f} tokens/s" if answer.tokens_per_second else ""
    stopped = "" if answer.finish_reason == "stop" else f", ended by {answer.finish_reason}"
    return f"{answer.output_tokens} tokens{rate}, first after {answer.ttft * 1000:.0f} ms{stopped}"


def _dim(text: str) -> None:
    """A remark on stderr, only for somebody who watches."""
    if sys.stderr.isatty():
        print(f"\x1b[2m{text}\x1b[0m", file=sys.stderr)
