"""The load generator against a fake server whose delays are known: times, loops, failures, and the law of the parts."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from fake_server import FakeServer, running

from tuili.base.errors import ConfigError
from tuili.bench import serving
from tuili.bench.http import Client, HttpError
from tuili.bench.load import Events, offer
from tuili.bench.serving import Plan
from tuili.bench.workload import Item, Span, Workload, fixed_random


def run(server: FakeServer, work: Workload | list[Workload], **fields: Any) -> dict[str, Any]:
    async def main() -> dict[str, Any]:
        async with running(server):
            works = work if isinstance(work, list) else [work]
            return await serving.measure(Plan(server.url, **{"warmups": 0, **fields}), works)

    return asyncio.run(main())


def work(count: int, output: int = 6) -> Workload:
    return fixed_random(count, Span(12, 12), Span(output, output))


def test_times_are_the_servers_delays() -> None:
    got = run(FakeServer(first=0.1, gap=0.03), work(4), concurrency=1, detailed=True)
    assert got["completed"] == 4
    assert got["failed"] == 0
    assert got["model_id"] == "fake"
    assert (got["total_input_tokens"], got["total_output_tokens"], got["cached_tokens"]) == (48, 24, 12)
    # Sleeps never end early; how late they end is the machine's business.
    assert 100 <= got["median_ttft_ms"] < 200
    assert 30 <= got["median_itl_ms"] < 80
    assert 30 <= got["median_tpot_ms"] < 80
    assert 250 <= got["median_e2el_ms"] < 500
    for ttft, itls, e2el in zip(got["ttfts"], got["itls"], got["e2els"], strict=True):
        assert len(itls) == 5
        assert ttft + sum(itls) == pytest.approx(e2el, rel=1e-9)


@pytest.mark.parametrize("fields", [{"concurrency": 1}, {"concurrency": 5}, {}, {"rate": 50.0}])
def test_the_sum_of_parts_is_the_wall(fields: dict[str, Any]) -> None:
    """INVENTORY row 35, with lanes and without."""
    got = run(FakeServer(first=0.15, gap=0.05), work(8), **fields)  # long beside what a busy machine adds
    parts = got["sum_of_parts"]
    assert parts["ratio"] == pytest.approx(1.0, abs=0.01)
    lanes = fields.get("concurrency")
    if lanes:
        assert parts["wall"] == pytest.approx(lanes * got["duration"])


def test_a_closed_loop_keeps_its_concurrency() -> None:
    server = FakeServer(first=0.02, gap=0.002)
    got = run(server, work(20), concurrency=4)
    assert server.peak == 4
    assert got["max_concurrent_requests"] == 4
    assert server.connections <= 5, "connections are kept"


def test_an_open_loop_sends_when_due() -> None:
    """10 requests at 100/s of a slow server: all overlap, and none waits for another."""
    server = FakeServer(first=0.4, gap=0.001)
    got = run(server, work(10), rate=100.0)
    assert server.peak == 10
    assert got["request_rate"] == 100.0
    assert got["mean_start_lag_ms"] < 200


def test_what_is_sent() -> None:
    server = FakeServer()
    run(server, work(1), api_key="k")
    body = server.bodies[0]
    assert body["prompt"] == list(work(1).items[0].tokens)
    assert body["max_tokens"] == 6
    assert body["ignore_eos"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert "Authorization: Bearer k" in server.headers[-1]


def test_chat_is_words_and_its_role_chunk_is_no_token() -> None:
    server = FakeServer(first=0.1)
    got = run(server, work(1), chat=True, model="m")
    assert server.bodies[0]["messages"] == [{"role": "user", "content": work(1).items[0].text}]
    assert server.bodies[0]["model"] == "m"
    assert got["median_ttft_ms"] >= 100
    assert got["total_output_tokens"] == 6


@pytest.mark.parametrize("split", [1, 3, 7])
def test_any_split_of_the_bytes_reads_the_same(split: int) -> None:
    got = run(FakeServer(first=0.0, gap=0.0, split=split), work(2))
    assert (got["completed"], got["total_output_tokens"]) == (2, 12)


def test_no_usage_is_counted_and_said() -> None:
    got = run(FakeServer(usage=False), work(2))
    assert got["output_tokens_estimated"]
    assert got["total_output_tokens"] == 12


def test_failures_are_counted_by_message_and_end_nobody_else() -> None:
    error = '{"error": {"message": "queue is full", "code": 503}}'
    server = FakeServer(
        refuse=lambda index: (503, error) if index % 3 == 0 else None, cut=lambda index: 2 if index == 4 else None
    )
    got = run(server, work(9), concurrency=3)
    assert (got["completed"], got["failed"]) == (5, 4)
    assert got["failures"]["StreamFailed: HTTP 503: queue is full"] == 3
    assert any("cut" in message for message in got["failures"])


def test_a_request_that_never_ends_times_out() -> None:
    got = run(FakeServer(first=5.0), work(1), timeout=0.1)
    assert list(got["failures"]) == ["no end after 0.1 s"]


def test_goodput_counts_those_within_the_limits() -> None:
    got = run(FakeServer(first=0.05, gap=0.001), work(5), concurrency=1, goodput={"ttft": 1000.0, "e2el": 2000.0})
    assert got["request_goodput"] == pytest.approx(got["request_throughput"])
    got = run(FakeServer(first=0.05, gap=0.001), work(5), concurrency=1, goodput={"ttft": 20.0})
    assert got["request_goodput"] == 0.0


def test_repeats_give_an_interval() -> None:
    works = [fixed_random(3, Span(5, 5), Span(4, 4), seed=seed) for seed in range(3)]
    got = run(FakeServer(), works, concurrency=1, warmups=2)
    low, high = got["output_throughput_ci95"]
    assert low <= sum(got["output_throughput_repeats"]) / 3 <= high
    assert got["completed"] == 9
    assert [w["seed"] for w in got["provenance"]["workloads"]] == [0, 1, 2]


def test_nobody_there_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="tuili serve"):
        asyncio.run(serving.measure(Plan("http://127.0.0.1:9"), [work(1)]))
    with pytest.raises(ConfigError, match="base URL"):
        Client("127.0.0.1:80")


def get(answer: bytes) -> tuple[int, bytes]:
    """What the client makes of a server that answers these bytes and closes."""

    async def main() -> tuple[int, bytes]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        try:
            response = await client.request("GET", "/")
        finally:
            client.close()
            server.close()
        return response.status, bytes(response.body)

    return asyncio.run(main())


def test_bodies_by_length_by_chunks_and_to_the_end() -> None:
    assert get(b"HTTP/1.0 200 OK\r\n\r\nall of it") == (200, b"all of it")
    assert get(b"HTTP/1.1 404 No\r\ncontent-length: 3\r\n\r\nyes and more") == (404, b"yes")
    assert get(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") == (200, b"")
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n3;x=y\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n"
    assert get(chunks) == (200, b"abc0123456789")
    assert get(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx") == (200, b"x")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"garbage\r\n\r\n", "cannot read"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", "cut"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", "cut"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nab", "cannot read"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nab\r\n", "cannot read"),
        (b"", "cut"),
    ],
)
def test_what_is_cut_or_not_http_is_an_error(answer: bytes, why: str) -> None:
    with pytest.raises(HttpError, match=why):
        get(answer)


def test_events_across_pieces() -> None:
    events = Events()
    got = [x for piece in (b"data: {", b"}\n\nda", b"ta: [DONE]\n", b"\n: note\n") for x in events.feed(piece)]
    assert got == [b"{}", b"[DONE]"]


CHUNKS = [
    {"choices": [{"index": 0, "text": " a", "finish_reason": None}]},
    {"choices": [{"index": 0, "text": " b", "finish_reason": None}]},
    {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]},
    {"choices": [], "usage": {"prompt_tokens": 8, "completion_tokens": 2}},
]


def odd(name: str) -> str:
    """Good streams that other servers send."""
    chunks: list[Any] = json.loads(json.dumps(CHUNKS))
    if name == "nulls":
        chunks = [{**chunk, "error": None, "usage": chunk.get("usage")} for chunk in chunks]
        chunks[-1]["choices"] = None
    elif name == "no prompt tokens":
        del chunks[-1]["usage"]["prompt_tokens"]
    elif name == "details null":
        chunks[-1]["usage"]["prompt_tokens_details"] = None
    elif name == "usage without counts":
        chunks[-1]["usage"] = {"prompt_tokens": None, "completion_tokens": None}
    elif name == "choice null":
        chunks[0]["choices"].append(None)
    elif name == "empty error":
        chunks[0]["error"] = {}
    lines = [f"data: {json.dumps(chunk)}" for chunk in chunks] + ["data: [DONE]"]
    if name == "no space":
        lines = [line.replace("data: ", "data:") for line in lines]
    if name == "no DONE":
        del lines[-1]
    if name == "comments and names":
        lines = [f": ping\nevent: message\nid: 7\nretry: 10\n{line}\ndata:" for line in lines]
    end = {"CRLF": "\r\n\r\n", "CR": "\r\r"}.get(name, "\n\n")
    return end.join(lines) + ("" if name == "no last newline" else end)


@pytest.mark.parametrize("split", [None, 1])
@pytest.mark.parametrize(
    "name",
    [
        *("plain", "nulls", "no prompt tokens", "details null", "usage without counts", "choice null", "empty error"),
        *("no space", "no DONE", "comments and names", "CRLF", "CR", "no last newline"),
    ],
)
def test_odd_but_good_streams_are_completed(name: str, split: int | None) -> None:
    got = run(FakeServer(stream=odd(name), split=split), fixed_random(2, Span(8, 8), Span(2, 2)))
    assert (got["completed"], got.get("failures")) == (2, {})
    assert (got["total_input_tokens"], got["total_output_tokens"]) == (16, 4)


@pytest.mark.parametrize(
    ("stream", "why"),
    [
        ('data: {"error": {"message": "out of memory"}}\n\ndata: [DONE]\n\n', "out of memory"),
        ('data: {"error": "gone"}\n\n', "gone"),
        ('data: {"choices": [{"text": "a"}]}\n\n', r"without \[DONE\]"),
        ("data: [1]\n\n", r"\[1\]"),
        ("data: {\n\n", "cannot read the answer"),
        ('data: {"choices": 7}\n\n', "cannot read the answer"),
        ('data: {"choices": [{"delta": "x"}]}\n\n', "cannot read the answer"),
    ],
)
def test_bad_streams_fail_with_their_reason(stream: str, why: str) -> None:
    got = run(FakeServer(stream=stream), work(1))
    assert got["completed"] == 0
    assert re.search(why, next(iter(got["failures"])))


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999", "http://[::1", "http://x:y", "ftp://x", ""])
def test_a_base_url_that_is_none_is_named(url: str) -> None:
    with pytest.raises(ConfigError, match="base URL"):
        Client(url)


@pytest.mark.parametrize("url", ["http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/"])
def test_a_base_url_may_end_in_v1_as_clients_have_it(url: str) -> None:
    assert Client(url).message("GET", "/v1/models").startswith(b"GET /v1/models HTTP/1.1")
    assert Client("http://a:1/proxy/v1").message("GET", "/v1/models").startswith(b"GET /proxy/v1/models ")


def test_hundreds_of_streams_at_once() -> None:
    server = FakeServer(first=0.3, gap=0.0)
    got = run(server, work(300, output=20))
    assert got["completed"] == 300
    assert server.peak == 300


def test_a_sender_that_breaks_is_not_swallowed() -> None:
    async def broken(item: Item, record: Any, origin: float) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        asyncio.run(offer(broken, [Item((1,), 1)], concurrency=1))
