"""Many clients at once, clients that leave, a server that stops: every stream ends, every block comes back."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable

import httpx
import pytest
from scripted import SCRIPT, TOKENIZER, Server, executor, run, serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


async def read_stream(client: httpx.AsyncClient, body: dict[str, object]) -> tuple[str, str]:
    """The text of a chat stream, and its last event."""
    text, last = "", ""
    async with client.stream("POST", CHAT, json={"messages": HELLO, "stream": True, **body}) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                text += "".join(choice["delta"].get("content", "") for choice in chunk["choices"])
            last = line or last
    return text, last


def test_300_streams_at_once(make_server: Callable[..., Server]) -> None:
    server = make_server(max_num_seqs=64)

    async def load(url: str) -> list[tuple[str, str]]:
        limits = httpx.Limits(max_connections=300)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            bodies = [{"temperature": 1, "seed": number % 7, "max_tokens": 30} for number in range(300)]
            return list(await asyncio.gather(*(read_stream(client, body) for body in bodies)))

    with serving(server) as url:
        found = run(load(url))
    line = TOKENIZER.encode(SCRIPT, False)
    for number, (text, last) in enumerate(found):
        assert text == TOKENIZER.decode(line[number % 7 :][:30]), number
        assert last == "data: [DONE]"
    server.wait_idle()
    assert len(server.finished) == 300
    assert {done.finish_reason for done in server.finished} == {"length"}
    server.engine.client.engine.scheduler.check_integrity()


@pytest.mark.parametrize(
    "body", [{"stream": True}, {"stream": False}, {"stream": True, "n": 3, "temperature": 1}], ids=str
)
def test_a_client_that_leaves_frees_its_blocks(make_server: Callable[..., Server], body: dict[str, object]) -> None:
    server = make_server(delay=0.005)

    async def leave(url: str) -> None:
        ask = {"messages": HELLO, "temperature": 0, "ignore_eos": True, "max_tokens": 900, **body}
        async with httpx.AsyncClient(base_url=url) as client:
            try:
                async with asyncio.timeout(0.15), client.stream("POST", CHAT, json=ask) as answer:
                    async for _ in answer.aiter_raw():
                        pass
            except TimeoutError:
                pass

    with serving(server) as url:
        run(leave(url))
        server.wait_idle(1.0)  # 900 tokens would take 4.5 s
        text = httpx.get(url + "/metrics").text
        assert httpx.get(url + "/load").json() == {"server_load": 0}
    assert 'tuili:kv_blocks_used{engine="0",model_name="scripted"} 0.0' in text
    assert {done.finish_reason for done in server.finished} == {"abort"}
    assert 'http_requests_total{handler="/v1/chat/completions",method="POST",status="4xx"} 1.0' in text


def test_a_client_that_leaves_while_it_waits(make_server: Callable[..., Server]) -> None:
    server = make_server()
    executor(server.engine).gate.clear()  # nothing moves: no first token, no header

    async def leave(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=0.2) as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.post(TEXT, json={"prompt": ["x"] * 5, "stream": True})

    with serving(server) as url:
        run(leave(url))
        time.sleep(0.1)
        executor(server.engine).gate.set()
        server.wait_idle()
    assert [done.finish_reason for done in server.finished] == ["abort"] * 5


def test_slow_readers_lose_nothing(make_server: Callable[..., Server]) -> None:
    server = make_server()

    async def slowly(url: str) -> str:
        text = ""
        ask = {
            "prompt": "x" * 200,
            "temperature": 0,
            "stream": True,
            "max_tokens": 800,
            "ignore_eos": True,
            "logprobs": 20,
        }
        async with (
            httpx.AsyncClient(base_url=url, timeout=30) as client,
            client.stream("POST", TEXT, json=ask) as answer,
        ):
            await asyncio.sleep(0.5)
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        return text

    with serving(server) as url:
        found = run(slowly(url))
    line = TOKENIZER.encode(SCRIPT, False)
    assert found == TOKENIZER.decode((line * 10)[:800])


def test_stopping_ends_streams_with_a_typed_error(make_server: Callable[..., Server]) -> None:
    server = make_server(delay=0.01)
    flight = server.app.service.flight

    async def stopped() -> tuple[httpx.Response, httpx.Response, httpx.Response]:
        ask = {"prompt": "x", "temperature": 0, "ignore_eos": True, "max_tokens": 900}
        async with server.client() as client:
            stream = asyncio.create_task(client.post(TEXT, json={**ask, "stream": True}))
            whole = asyncio.create_task(client.post(TEXT, json=ask))
            while server.app.service.engine.snapshot().steps < 30:
                await asyncio.sleep(0.01)
            flight.stop()
            return await stream, await whole, await client.post(TEXT, json=ask)

    stream, whole, late = run(stopped())
    *chunks, error, done, _ = stream.text.split("\n\n")
    assert (stream.status_code, done) == (200, "data: [DONE]")
    assert len(chunks) > 3
    assert json.loads(error.removeprefix("data: "))["error"]["type"] == "ServiceUnavailableError"
    for answer in (whole, late):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, 503)
        assert "retry-after" in answer.headers
    server.wait_idle()
