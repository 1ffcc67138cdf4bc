"""The official ``openai`` client against a real uvicorn: what most users will send."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from scripted import LINE, SCRIPT, TOKENIZER, Server, serving

HELLO: Any = [{"role": "user", "content": "hello"}]
MODEL = "scripted"


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=30) as made:
        yield made


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0)
    assert answer.choices[0].message.content == SCRIPT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(LINE) + 1
    assert answer.usage.prompt_tokens_details is not None


def test_chat_stream(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, temperature=0, stream=True, stream_options=options, logprobs=True, top_logprobs=2
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == SCRIPT
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(LINE) + 1
    tokens = [e for c in chunks if c.choices and c.choices[0].logprobs for e in c.choices[0].logprobs.content or ()]
    assert bytes(b for entry in tokens[:-1] for b in entry.bytes or ()) == SCRIPT.encode()


def test_stream_helper_puts_the_answer_together(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=HELLO, temperature=0) as stream:
        kinds = {event.type for event in stream}
        assert "content.delta" in kinds
        assert stream.get_final_completion().choices[0].message.content == SCRIPT


def test_logprobs_and_n_and_seed(client: openai.OpenAI) -> None:
    ask: Any = {"model": MODEL, "messages": HELLO, "n": 3, "seed": 2, "max_tokens": 5, "logprobs": True}
    answer = client.chat.completions.create(**ask, top_logprobs=2)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert [c.message.content for c in answer.choices] == [TOKENIZER.decode(LINE[k : k + 5]) for k in (2, 3, 4)]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content[0].top_logprobs) == 2
    again = client.chat.completions.create(**ask, top_logprobs=2)
    assert [c.message for c in again.choices] == [c.message for c in answer.choices]


def test_stop_and_extra_body(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        temperature=0,
        stop=["met"],
        extra_body={"include_stop_str_in_output": True, "top_k": 3},
    )
    assert answer.choices[0].message.content == "Once, 推理 met"


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["ab", "c"], temperature=0, max_tokens=4, echo=True, logprobs=1
    )
    assert [c.text for c in answer.choices] == ["abOnce", "cOnce"]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.text_offset == [0, 1, 2, 3, 4, 5]
    stream = client.completions.create(model=MODEL, prompt="x", temperature=0, max_tokens=30, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == TOKENIZER.decode(LINE[:30])


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "tuili"


def test_errors(client: openai.OpenAI) -> None:
    ask: Any = {"model": MODEL, "messages": HELLO}
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(**ask, temperature=3)
    assert (wrong.value.param, wrong.value.status_code, wrong.value.type) == ("temperature", 400, "BadRequestError")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(**ask, response_format={"type": "json_object"})
    assert wrong.value.param == "response_format"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert missing.value.param == "model"
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model=MODEL, prompt="FAIL", temperature=0)


def test_an_error_in_a_stream_reaches_the_client(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "FAIL"}], temperature=0, stream=True
    )
    got = []
    with pytest.raises(openai.APIError, match="a bad number"):
        got.extend(stream)
    assert len(got) == 1 + 3


def test_a_full_server_is_tried_again(make_server: Callable[..., Server]) -> None:
    server = make_server(max_num_queued_reqs=1, max_num_seqs=1, delay=0.05)
    with serving(server) as url, openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        ask: Any = {"model": MODEL, "temperature": 0, "prompt": "x"}
        with pytest.raises(openai.BadRequestError, match="takes 2 requests at a time"):
            client.completions.create(**ask | {"prompt": ["x"] * 9})
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(client.completions.create, **ask | {"prompt": ["x"] * 2})
            while not server.engine.snapshot().num_running:
                time.sleep(0.001)
            with pytest.raises(openai.InternalServerError) as full:
                client.completions.create(**ask)
            assert len(first.result().choices) == 2
        assert full.value.status_code == 503
        assert full.value.response.headers["retry-after"] == "1"
        assert client.with_options(max_retries=3).completions.create(**ask).choices[0].text
