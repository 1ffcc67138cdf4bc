"""``tuili run`` on a tiny random model: one-shot, standard input, JSON, and the chat with its commands."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tuili.base.config import Config
from tuili.cli import run as module
from tuili.cli.run import Session

if TYPE_CHECKING:
    from conftest import Invoke
    from tiny_models import Tiny

    from tuili.engine.text import TextEngine


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Path:
    return tiny("llama")


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[TextEngine]:
    from tuili.engine.build import build

    engine = build(Config(model=str(model), threads=1))
    yield engine
    engine.close()


def test_json_is_one_clean_object(tuili: Invoke, model: Path) -> None:
    words = ("run", model, "--threads", 1, "--prompt", "hello", "--max-tokens", 8, "--json", "--temperature", 0)
    result = tuili(*words)
    assert result.exit_code == 0, result.output
    got = json.loads(result.stdout)
    assert got["usage"]["completion_tokens"] <= 8
    assert got["usage"]["total_tokens"] == got["usage"]["prompt_tokens"] + got["usage"]["completion_tokens"]
    assert got["finish_reason"] in ("stop", "length")
    assert 0 < got["timings"]["ttft_seconds"] <= got["timings"]["total_seconds"]
    assert got["model"] == str(model)


def test_plain_output_is_the_text_of_the_json(tuili: Invoke, model: Path) -> None:
    words = ("run", model, "--threads", 1, "--prompt", "hello", "--max-tokens", 8, "--seed", 5)
    text, again = tuili(*words).stdout, tuili(*words).stdout
    assert text == again == json.loads(tuili(*words, "--json").stdout)["text"] + "\n"
    assert tuili(*words[:-1], 6).stdout != text


def test_raw_text_has_no_template_around_it(tuili: Invoke, model: Path) -> None:
    words = ("run", model, "--threads", 1, "--max-tokens", 2, "--json")
    raw = json.loads(tuili(*words, "--raw", "--prompt", "hello").stdout)
    chat = json.loads(tuili(*words, "--prompt", "hello").stdout)
    assert raw["usage"]["prompt_tokens"] == len("hello")  # the tiny tokenizer is bytes
    assert chat["usage"]["prompt_tokens"] > len("hello")


def test_standard_input_is_the_prompt(tuili: Invoke, model: Path) -> None:
    words = ("run", model, "--threads", 1, "--raw", "--max-tokens", 2, "--json")
    for given, text in (
        (words, "from a pipe"),
        ((*words, "--prompt", "-"), "from a pipe\n"),
        (words, "from a pipe\r\n"),
    ):
        got = json.loads(tuili(*given, input=text).stdout)
        assert got["usage"]["prompt_tokens"] == len("from a pipe")


def test_answers_may_fill_the_context(tuili: Invoke, model: Path) -> None:
    """No limit given, none in the model: not the 16 tokens of the Python API."""
    words = ("run", model, "--threads", 1, "--raw", "--prompt", "ab", "--json", "--max-model-len", 64, "--seed", 1)
    got = json.loads(tuili(*words).stdout)
    assert got["finish_reason"] == "stop" or got["usage"]["total_tokens"] == 64
    assert got["usage"]["completion_tokens"] > 16


def test_wrong_values_are_named(tuili: Invoke, model: Path) -> None:
    result = tuili("run", model, "--prompt", "x", "--temperature", 9)
    assert "temperature must be in [0.0, 2.0]" in str(result.exception)


def chat(engine: TextEngine, lines: list[str], monkeypatch: pytest.MonkeyPatch, **fields: object) -> Session:
    session = Session(engine, engine.default_params(max_tokens=4, temperature=0.0), **fields)  # type: ignore[arg-type]
    waiting = iter(lines)

    def ask(prompt: str) -> str:
        line = next(waiting, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", ask)
    module._chat(session)
    return session


def test_the_chat_remembers(engine: TextEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    session = chat(engine, ["one", "", "^C", "two"], monkeypatch)
    assert [turn["role"] for turn in session.turns] == ["user", "assistant"] * 2
    assert [turn["content"] for turn in session.turns[::2]] == ["one", "two"]
    assert session.turns[1]["content"] in capsys.readouterr().out


def test_commands(engine: TextEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    session = chat(engine, ["one", "/reset", "two", "/exit", "never"], monkeypatch)
    assert [turn["content"] for turn in session.turns[::2]] == ["two"]
    session = chat(engine, ["one", "/system  be brief ", "two"], monkeypatch)
    assert session.system == "be brief"
    assert [turn["content"] for turn in session.turns[::2]] == ["two"]
    ids = session.prompt("three")
    assert "be brief" in engine.tokenizer.decode(ids, skip_special_tokens=False)
    chat(engine, ["/nonsense", "/help"], monkeypatch)
    assert "unknown command /nonsense" in capsys.readouterr().err


def test_a_long_chat_forgets_its_oldest_turns(engine: TextEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 tokens of context, about 60 per turn: the chat goes on, and the newest question is always there."""
    session = chat(engine, [f"{number} " + "x" * 30 for number in range(8)], monkeypatch)
    assert session.dropped > 0
    assert session.turns[-2]["content"].startswith("7 ")
    assert session.turns[0]["role"] == "user"


def test_a_question_that_does_not_fit_is_refused_and_forgotten(
    engine: TextEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    session = chat(engine, ["x" * 400, "short"], monkeypatch)
    assert "shorten" in capsys.readouterr().err
    assert [turn["content"] for turn in session.turns[::2]] == ["short"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("output", [Terminal, io.StringIO])
def test_answers_wrap_at_words_on_a_terminal_only(
    engine: TextEngine, monkeypatch: pytest.MonkeyPatch, output: type[io.StringIO]
) -> None:
    story = "Once upon a time there was a little fox who lived by the sea. "

    async def tell(session: Session, text: str, answer: module.PrintedAnswer, show: Callable[[str], None]) -> None:
        for at in range(0, len(story), 3):
            show(story[at : at + 3])
        if text == "^C":
            raise KeyboardInterrupt

    monkeypatch.setattr(Session, "answer", tell)
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(sys, "stdout", output())
    session = Session(engine, engine.default_params())
    module._once(session, "x", False, 0.0)
    with asyncio.Runner() as runner:
        module._turn(session, runner, "^C")
    once, stopped = sys.stdout.getvalue().split("sea. \n")[:2]  # type: ignore[attr-defined]
    want = "Once upon a time\nthere was a little\nfox who lived by the\n" if output is Terminal else story[:-5]
    assert once == stopped == want


@pytest.mark.parametrize(
    "words", [(), ("--prompt", "-"), ("--prompt", "caf\udce9"), ("--prompt", "x", "--system", "\udce9")]
)
def test_what_is_no_utf8_is_refused_in_one_message(model: Path, words: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "tuili", "run", str(model), "--max-tokens", "2", *words]
    for locale in ("C.UTF-8", "C"):
        result = subprocess.run(
            [os.fsencode(word) for word in command],
            input=b"caf\xe9",
            capture_output=True,
            env={**os.environ, "LC_ALL": locale},
        )
        assert result.returncode == 1
        assert b"is not UTF-8" in result.stderr
        assert result.stderr.count(b"\n") == 1
        assert not result.stdout


def test_a_line_of_the_chat_that_is_no_utf8_is_refused_and_the_chat_goes_on(
    engine: TextEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    session = chat(engine, ["caf\udce9", "/system \udce9", "short"], monkeypatch)
    assert capsys.readouterr().err.count("the line is not UTF-8") == 2
    assert [turn["content"] for turn in session.turns[::2]] == ["short"]
    assert session.system is None


def test_closed_and_empty_standard_input_and_a_reader_that_left(model: Path) -> None:
    run = f"{sys.executable} -m tuili run {model} --max-tokens 2"
    for line, code in ((f"{run} <&-", 2), (f"{run} </dev/null", 2), (f"{run} --prompt x | true", 0), (f"{run} </", 1)):
        result = subprocess.run(["bash", "-c", line], capture_output=True)
        assert b"Traceback" not in result.stderr, line
        assert result.returncode == code, (line, result.stderr)


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_not_the_program(model: Path) -> None:
    """A real terminal: Ctrl-C while it answers, then another question, then Ctrl-D."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "tuili", "run", str(model), "--threads", "1", "--temperature", "0"]
    process = subprocess.Popen(
        command,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(follower)
    seen = b""

    def until(mark: bytes, seconds: float = 90.0) -> None:
        nonlocal seen
        end = time.monotonic() + seconds
        while mark not in seen:
            assert time.monotonic() < end, seen[-400:]
            seen += os.read(leader, 4096)
        seen = seen.split(mark, 1)[1]

    until(b"> ")
    os.write(leader, b"hello\n")
    until(b"hello")
    time.sleep(0.3)
    os.write(leader, b"\x03")
    until(b"> ")
    os.write(leader, b"/system\n")
    until(b"system prompt: none")
    until(b"> ")
    os.write(leader, b"\x04")
    assert process.wait(30) == 0
    os.close(leader)
