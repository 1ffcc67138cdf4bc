"""Slow, silent, greedy and broken clients on real sockets, with both of uvicorn's parsers: each has its end, and nobody
else waits for it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import select
import socket
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from scripted import SCRIPT, Server, executor, serving

PARSERS = [
    "h11",
    pytest.param(
        "httptools",
        marks=pytest.mark.skipif(importlib.util.find_spec("httptools") is None, reason="needs httptools"),
    ),
]
TEXT = "/v1/completions"
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
pytestmark = pytest.mark.parametrize("parser", PARSERS)


@contextlib.contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as sock:
        yield sock


def post(body: bytes, *headers: str) -> bytes:
    head = "\r\n".join([f"POST {TEXT} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers])
    return head.encode() + b"\r\n\r\n" + body


def answers(sock: socket.socket, count: int = 1) -> list[tuple[int, bytes]]:
    """Status and body of ``count`` answers with a content-length."""
    found, raw = [], b""
    while len(found) < count:
        head, end, rest = raw.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]) if end else 0
        if not end or len(rest) < length:
            more = sock.recv(65536)
            assert more, raw
            raw += more
            continue
        found.append((int(head.split()[1]), rest[:length]))
        raw = rest[length:]
    assert not raw
    return found


def refused(sock: socket.socket, status: int) -> str:
    """The message of the typed error that ends the connection."""
    ((found, body),) = answers(sock)
    error = json.loads(body)["error"]
    assert (found, error["code"], set(error)) == (status, status, {"message", "type", "param", "code"})
    assert ended(sock)
    return error["message"]


def dribble(sock: socket.socket, piece: bytes) -> None:
    """Send ``piece`` again and again until there is an answer."""
    end = time.monotonic() + 10
    while not select.select([sock], [], [], 0.05)[0]:
        assert time.monotonic() < end
        sock.sendall(piece)


def ended(sock: socket.socket) -> bool:
    try:
        return sock.recv(100) == b""
    except ConnectionResetError:
        return True


# ------------------------------------------------------------------------------------------------- slow and silent


def test_silent_connections_end(make_server: Callable[..., Server], parser: str) -> None:
    with serving(make_server(timeout_header=0.3), parser) as url, connected(url) as sock:
        began = time.monotonic()
        assert ended(sock)
        assert 0.2 < time.monotonic() - began < 3


def test_a_head_that_dribbles_is_a_408(make_server: Callable[..., Server], parser: str) -> None:
    with serving(make_server(timeout_header=0.5), parser) as url:
        for warm in (False, True):  # also on a connection that was good before
            with connected(url) as sock:
                if warm:
                    sock.sendall(GET)
                    answers(sock)
                sock.sendall(b"GET /")
                dribble(sock, b"a")
                assert "--timeout-header" in refused(sock, 408)


def test_a_body_that_dribbles_is_a_408(make_server: Callable[..., Server], parser: str) -> None:
    with serving(make_server(timeout_body=0.5), parser) as url:
        for start in (post(b'{"pro', "Content-Length: 1000"), post(b"2\r\n{ \r\n", "Transfer-Encoding: chunked")):
            with connected(url) as sock:
                sock.sendall(start)
                dribble(sock, b"1\r\n \r\n" if b"chunked" in start else b" ")
                assert "--timeout-body" in refused(sock, 408)


def test_a_body_that_nobody_reads_ends_too(make_server: Callable[..., Server], parser: str) -> None:
    with serving(make_server(timeout_body=0.5), parser) as url, connected(url) as sock:
        sock.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        assert answers(sock)[0][0] == 404
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 5:
                sock.sendall(b" ")
                time.sleep(0.1)
        assert time.monotonic() - began < 3


def test_a_connection_outlives_a_body_that_was_refused(make_server: Callable[..., Server], parser: str) -> None:
    """The rest of the body is read and dropped: it is neither a head nor the next request."""
    with serving(make_server(max_body_bytes=100_000), parser) as url, connected(url) as sock:
        for _ in range(2):
            sock.sendall(post(b"x" * 1_000_000, "Content-Length: 1000000"))
            assert answers(sock)[0][0] == 413
        sock.sendall(GET)
        assert answers(sock)[0][0] == 200


def test_large_bodies_at_once_are_bounded(make_server: Callable[..., Server], parser: str) -> None:
    """Connections times the size of a body would fill the memory."""
    server = make_server(max_body_bytes=200_000)
    room = server.app.service.room
    assert room.left == 32 * 200_000
    with serving(server, parser) as url, contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connected(url)) for _ in range(60)]
        for sock in socks:
            sock.sendall(post(b" " * 190_000, "Content-Length: 200000"))
        full: set[socket.socket] = set()
        while answered := select.select(set(socks) - full, [], [], 0.5)[0]:
            full |= set(answered)
        assert 1 <= len(full) <= 30
        assert {answers(sock)[0][0] for sock in full} == {503}
        assert httpx.post(url + TEXT, json={"prompt": "x", "max_tokens": 1}).status_code == 200
        for sock in set(socks) - set(full):
            sock.sendall(b" " * 10_000)
            assert answers(sock)[0][0] == 400
    assert room.left == 32 * 200_000


def test_thousands_of_requests_in_one_piece(make_server: Callable[..., Server], parser: str) -> None:
    with serving(make_server(), parser) as url, connected(url) as sock:
        sock.sendall(GET * 3000)
        assert {status for status, _ in answers(sock, 3000)} == {200}


def test_idle_connections_are_kept_as_long_as_the_option_says(make_server: Callable[..., Server], parser: str) -> None:
    for seconds, kept in ((0.3, False), (120, True)):
        with (
            serving(make_server(timeout_keep_alive=seconds, timeout_header=0.3), parser) as url,
            connected(url) as sock,
        ):
            sock.sendall(GET)
            assert answers(sock)[0][0] == 200
            time.sleep(1.0)
            if kept:
                sock.sendall(GET)
                assert answers(sock)[0][0] == 200
            else:
                assert ended(sock)


def test_waiting_for_a_slow_answer_has_no_deadline(make_server: Callable[..., Server], parser: str) -> None:
    server = make_server(delay=0.05, timeout_header=0.2, timeout_body=0.2, timeout_keep_alive=0.2)
    with serving(server, parser) as url:
        answer = httpx.post(url + TEXT, json={"prompt": "x", "temperature": 0, "max_tokens": 20}, timeout=20)
    assert answer.json()["usage"]["completion_tokens"] == 20


def test_a_client_that_takes_nothing_is_dropped_and_its_request_aborted(
    make_server: Callable[..., Server], parser: str
) -> None:
    server = make_server(timeout_write=0.5, max_model_len=20_000, blocks=20_000)
    ask = {"prompt": "x", "temperature": 0, "stream": True, "max_tokens": 19_000, "ignore_eos": True, "logprobs": 20}
    body = json.dumps(ask).encode()
    with serving(server, parser) as url, connected(url) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(post(body, f"Content-Length: {len(body)}"))
        flight = server.app.service.flight
        end = time.monotonic() + 60
        while (flight or not server.finished) and time.monotonic() < end:
            time.sleep(0.05)
        server.wait_idle()
    assert [done.finish_reason for done in server.finished] == ["abort"]


@pytest.mark.parametrize("how", ["close", "reset", "half"])
def test_a_stream_that_its_client_left_is_noted(make_server: Callable[..., Server], parser: str, how: str) -> None:
    server = make_server(delay=0.01)
    ask = {"prompt": "x", "temperature": 0, "stream": True, "max_tokens": 900, "ignore_eos": True}
    body = json.dumps(ask).encode()
    with serving(server, parser) as url:
        with connected(url) as sock:
            sock.sendall(post(body, f"Content-Length: {len(body)}"))
            assert b"data: {" in sock.recv(65536) + sock.recv(65536)
            if how == "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            if how == "half":
                sock.shutdown(socket.SHUT_WR)
                server.wait_idle(2.0)
        server.wait_idle(2.0)  # 900 tokens would take 9 s
        (done,) = server.finished
        assert done.finish_reason == "abort"
        assert done.usage.completion_tokens < 200
        line = f'http_requests_total{{handler="{TEXT}",method="POST",status="4xx"}} 1.0'
        assert line in httpx.get(url + "/metrics").text


# --------------------------------------------------------------------------------------------------- many and large


def test_a_head_has_a_size(make_server: Callable[..., Server], parser: str) -> None:
    with serving(make_server(h11_max_incomplete_event_size=16_000, h11_max_header_count=20), parser) as url:
        with connected(url) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 14_000 + b"\r\n\r\n")
            assert answers(sock)[0][0] == 200
        with connected(url) as sock:
            with contextlib.suppress(OSError):
                for _ in range(40):
                    sock.sendall(b"GET /" + b"a" * 1000 if _ == 0 else b"a" * 1000)
            assert refused(sock, 431 if parser == "httptools" else 400)
        with connected(url) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 30 + b"\r\n")
            assert "--h11-max-header-count" in refused(sock, 431)


def test_trailers_are_bounded(make_server: Callable[..., Server], parser: str) -> None:
    with serving(make_server(h11_max_incomplete_event_size=16_000), parser) as url, connected(url) as sock:
        sock.sendall(post(b"2\r\n{}\r\n0\r\n", "Transfer-Encoding: chunked"))
        with contextlib.suppress(OSError):
            for number in range(200_000):
                sock.sendall(b"Trailer-%d: 1\r\n" % number)
        assert httpx.get(url + "/health").status_code == 200  # and this connection is gone:
        with contextlib.suppress(OSError):
            time.sleep(0.1)
            while sock.recv(65536):
                pass
            sock.sendall(b"x")
            time.sleep(0.1)
            sock.sendall(b"x")
            pytest.fail("the connection lives on")


def test_at_the_limit_idle_connections_make_room(make_server: Callable[..., Server], parser: str) -> None:
    with serving(make_server(limit_concurrency=3), parser) as url, contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connected(url)) for _ in range(3)]
        for sock in (socks[1], socks[0], socks[2]):  # the first is not the longest idle one
            sock.sendall(GET)
            answers(sock)
            time.sleep(0.02)
        new = stack.enter_context(connected(url))
        new.sendall(GET)
        assert answers(new)[0][0] == 200
        assert ended(socks[1])
        for sock in (socks[0], socks[2]):
            sock.sendall(GET)
            assert answers(sock)[0][0] == 200


def test_at_the_limit_busy_connections_stay(make_server: Callable[..., Server], parser: str) -> None:
    server = make_server(limit_concurrency=2)
    executor(server.engine).gate.clear()
    body = b'{"prompt":"x","max_tokens":1}'
    with serving(server, parser) as url, contextlib.ExitStack() as stack:
        busy = [stack.enter_context(connected(url)) for _ in range(2)]
        for sock in busy:
            sock.sendall(post(body, f"Content-Length: {len(body)}"))
        while len(server.app.service.flight) < 2:
            time.sleep(0.01)
        assert "--limit-concurrency" in refused(stack.enter_context(connected(url)), 503)
        executor(server.engine).gate.set()
        assert [answers(sock)[0][0] for sock in busy] == [200, 200]


# ------------------------------------------------------------------------------------------------------ odd and broken


@pytest.mark.parametrize("raw", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"hello\r\n\r\n"])
def test_what_is_not_http_is_a_400(make_server: Callable[..., Server], parser: str, raw: bytes) -> None:
    with serving(make_server(), parser) as url, connected(url) as sock:
        sock.sendall(raw)
        refused(sock, 400)


def test_garbage_behind_a_request_spoils_no_stream(make_server: Callable[..., Server], parser: str) -> None:
    server = make_server(delay=0.005)
    body = b'{"prompt":"x","temperature":0,"max_tokens":60,"stream":true}'
    with serving(server, parser) as url, connected(url) as sock:
        sock.sendall(post(body, f"Content-Length: {len(body)}"))
        time.sleep(0.1)
        sock.sendall(b"\x00\xff garbage\r\n\r\n")
        raw = b""
        with contextlib.suppress(OSError):
            while more := sock.recv(65536):
                raw += more
        assert raw.count(b"HTTP/1.1 ") <= 2, raw
        assert b"HTTP/1.1 400" not in raw or raw.index(b"HTTP/1.1 400") > raw.index(b"[DONE]")
        server.wait_idle()


def test_pipelined_requests_are_answered_in_order(make_server: Callable[..., Server], parser: str) -> None:
    body = b'{"prompt":"%d","max_tokens":1,"echo":true,"temperature":0}'
    with serving(make_server(), parser) as url, connected(url) as sock:
        bodies = [body % number for number in range(20)]
        sock.sendall(b"".join(post(each, f"Content-Length: {len(each)}") for each in bodies))
        texts = [json.loads(found)["choices"][0]["text"] for _, found in answers(sock, 20)]
    assert texts == [f"{number}O" for number in range(20)]


def test_chunks_and_expectations(make_server: Callable[..., Server], parser: str) -> None:
    body = b'{"prompt":"x","temperature":0,"max_tokens":null}'
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    with serving(make_server(), parser) as url, connected(url) as sock:
        sock.sendall(post(chunks, "Transfer-Encoding: chunked"))
        assert json.loads(answers(sock)[0][1])["choices"][0]["text"] == SCRIPT
        sock.sendall(post(b"", f"Content-Length: {len(body)}", "Expect: 100-continue"))
        assert sock.recv(1000).startswith(b"HTTP/1.1 100 Continue\r\n")
        sock.sendall(body)
        assert json.loads(answers(sock)[0][1])["choices"][0]["text"] == SCRIPT


def test_head_is_get_without_a_body(make_server: Callable[..., Server], parser: str) -> None:
    with serving(make_server(), parser) as url:
        for path in ("/health", "/v1/models", "/metrics", "/openapi.json", "/version/"):
            head, get = httpx.head(url + path), httpx.get(url + path)
            assert (head.status_code, head.content, get.status_code) == (200, b"", 200)
            assert head.headers["content-type" if get.content else "content-length"]
        assert httpx.head(url + TEXT).status_code == 405
