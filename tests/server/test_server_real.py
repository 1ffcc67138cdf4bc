"""The server on the real engine with a tiny random model; the oracle of tokens and logprobs is transformers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
import torch
from scripted import Server, run, serving
from tiny_models import prompt, reference_greedy, reference_logits

from tuili.base.config import Config
from tuili.engine.build import build

if TYPE_CHECKING:
    from tiny_models import Tiny

TEXT = "/v1/completions"


@pytest.fixture(scope="module")
def checkpoint(tiny: Tiny) -> Path:
    return tiny("llama")


@pytest.fixture(scope="module")
def real(checkpoint: Path) -> Iterator[Server]:
    config = Config(model=str(checkpoint), served_model_name="tiny", num_gpu_blocks_override=2000, threads=1)
    server = Server(build(config))
    yield server
    server.engine.close()


def completion(server: Server, **fields: Any) -> dict[str, Any]:
    answer = server.post(TEXT, {"temperature": 0, "ignore_eos": True, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_greedy_tokens_are_those_of_transformers(real: Server, checkpoint: Path) -> None:
    prompts = [prompt(length, length) for length in (1, 7, 40)]
    answer = completion(real, prompt=prompts, max_tokens=24, return_token_ids=True)
    for choice, ids in zip(answer["choices"], prompts, strict=True):
        assert choice["token_ids"] == reference_greedy(checkpoint, ids, 24)


def test_logprobs_are_those_of_transformers(real: Server, checkpoint: Path) -> None:
    ids = prompt(12, 3)
    answer = completion(real, prompt=ids, max_tokens=6, logprobs=5, echo=True, return_token_ids=True)
    choice = answer["choices"][0]
    whole = ids + choice["token_ids"]
    scores = torch.log_softmax(reference_logits(checkpoint, whole), dim=-1)
    expected = [float(scores[place - 1, token]) for place, token in enumerate(whole) if place]
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-3)
    best = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][1:]]
    assert best == pytest.approx(scores[:-1].max(dim=-1).values.tolist(), abs=1e-3)


def test_streams_equal_answers(real: Server) -> None:
    body = {"prompt": ["Zürich 推理", "👩‍🚀"], "n": 2, "temperature": 1.3, "seed": 4, "max_tokens": 40, "logprobs": 1}
    whole = real.post(TEXT, body).json()
    raw = real.post(TEXT, {**body, "stream": True}).text.split("\n\n")[:-2]
    chunks = [json.loads(item.removeprefix("data: ")) for item in raw]
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert [value for c in own for value in c["logprobs"]["token_logprobs"]] == choice["logprobs"]["token_logprobs"]


def test_seeds(real: Server) -> None:
    ask = {"prompt": "abc", "temperature": 1, "max_tokens": 20}
    texts = [completion(real, **ask, seed=seed)["choices"][0]["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 2**62},
        {"top_p": 1e-300},
        {"temperature": 1e-4},
        {"min_p": 1},
        {"repetition_penalty": 1e6},
        {"repetition_penalty": 1e-6},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"logit_bias": {str(id): -100 for id in range(259)}},
        {"allowed_token_ids": [5]},
        {"allowed_token_ids": [5], "logit_bias": {"5": -100}},
        {"bad_words": ["a", "推理"]},
        {"seed": -(2**63)},
        {"min_tokens": 20, "stop": ["a"]},
        {"logprobs": 20, "prompt_logprobs": 20},
        {"stop_token_ids": list(range(259))},
    ],
    ids=str,
)
def test_extreme_values_harm_nobody(real: Server, fields: dict[str, Any]) -> None:
    """In one batch with a normal request, whose tokens stay what they are."""

    async def both() -> list[httpx.Response]:
        async with real.client() as client:
            plain = {"prompt": "plain", "temperature": 0, "max_tokens": 20, "ignore_eos": True}
            odd = {"prompt": "odd", "temperature": 1, "max_tokens": 20, **fields}
            return list(await asyncio.gather(*(client.post(TEXT, json=body) for body in (plain, odd))))

    normal = completion(real, prompt="plain", max_tokens=20)["choices"][0]["text"]
    plain, odd = run(both())
    assert plain.json()["choices"][0]["text"] == normal
    assert odd.status_code == 200, odd.text


def test_openai_client(real: Server) -> None:
    with serving(real) as url, openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        ask: Any = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 12,
            "temperature": 0,
        }
        answer = client.chat.completions.create(**ask)
        text = "".join(c.choices[0].delta.content or "" for c in client.chat.completions.create(**ask, stream=True))
        assert text == answer.choices[0].message.content
        with pytest.raises(openai.BadRequestError) as wrong:
            client.chat.completions.create(**{**ask, "max_tokens": 5000})
        assert wrong.value.param == "max_tokens"


def test_disconnects_leak_nothing(real: Server) -> None:
    async def leave(url: str) -> None:
        async def one(client: httpx.AsyncClient, number: int) -> None:
            body = {"prompt": [number + 1] * 20, "max_tokens": 200, "ignore_eos": True, "stream": number % 3 > 0}
            try:
                async with asyncio.timeout(0.05 * (number % 5)), client.stream("POST", TEXT, json=body) as answer:
                    async for _ in answer.aiter_raw():
                        pass
            except (TimeoutError, httpx.HTTPError):
                pass

        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            await asyncio.gather(*(one(client, number) for number in range(40)))

    with serving(real) as url:
        run(leave(url))
        real.wait_idle()
    real.engine.client.engine.scheduler.check_integrity()


@pytest.mark.slow
def test_300_streams(real: Server, checkpoint: Path) -> None:
    """Each stream ends, and says what the same request says alone."""

    async def load(url: str) -> list[str]:
        async def one(client: httpx.AsyncClient, number: int) -> str:
            ask = {"prompt": f"prompt {number % 10}", "max_tokens": 30, "temperature": 1, "seed": number % 10}
            text, last = "", ""
            async with client.stream("POST", TEXT, json={**ask, "stream": True}) as answer:
                async for line in answer.aiter_lines():
                    last = line or last
                    if line.startswith("data: {"):
                        text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            assert last == "data: [DONE]"
            return text

        async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=300)) as client:
            return list(await asyncio.gather(*(one(client, number) for number in range(300))))

    alone = []
    for number in range(10):
        body = {"prompt": f"prompt {number}", "max_tokens": 30, "temperature": 1, "seed": number}
        alone.append(real.post(TEXT, body).json()["choices"][0]["text"])
    with serving(real) as url:
        found = run(load(url))
    assert found == [alone[number % 10] for number in range(300)]
    real.wait_idle()
