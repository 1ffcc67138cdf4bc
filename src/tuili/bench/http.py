"""A small HTTP/1.1 client on bare asyncio: one parser call per read, so that hundreds of streams cost next to nothing.

It speaks what benchmarks need: POST and GET, bodies by length, by chunks or to the end, keep-alive, TLS. No redirects.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tuili.base.errors import ConfigError, TuiliError


class HttpError(TuiliError):
    """The exchange failed below HTTP: no connection, cut in the middle, or not HTTP."""


@dataclass(slots=True)
class Response:
    """Status, headers (lower-case names) and the body: whole, unless a sink took it piece by piece."""

    status: int
    headers: dict[str, str]
    body: bytearray = field(default_factory=bytearray)


#: Kept connections older than this (seconds) are dropped: servers close idle ones after 5 s, and the race is theirs
#: to win.
IDLE_SECONDS = 2.0

#: Takes a piece of a body and the time (perf_counter seconds) at which it arrived.
Sink = Callable[[bytes, float], None]


class Exchange(asyncio.Protocol):
    """One connection, one request at a time. Head, then body: ``_length`` bytes, chunks, or everything until the
    end."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.reusable = True
        self._buffer = bytearray()
        self._response: Response | None = None
        self._length: int | None = None
        self._chunked = False
        self._sink: Sink | None = None
        self._done: asyncio.Future[Response] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def send(self, message: bytes, sink: Sink | None = None) -> asyncio.Future[Response]:
        """Write a whole request; the future gives the response when its body has ended."""
        assert self.transport is not None
        self._done = asyncio.get_running_loop().create_future()
        self._response, self._length, self._chunked, self._sink = None, None, False, sink
        self.transport.write(message)
        return self._done

    def abort(self) -> None:
        """Drop the connection at once, as a client that goes away does."""
        self.reusable = False
        if self.transport is not None:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._buffer += data
        try:
            if self._response is None and not self._head():
                return
            self._body(now)
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # those of the sink, too
            self._fail(f"cannot read the answer: {error}")
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        if self._response is not None and self._length is None and not self._chunked and error is None:
            self._finish()
        else:
            self._fail(f"the connection was cut before the answer was complete{f' ({error})' if error else ''}")

    def _head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        lines = self._buffer[:end].decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        status = int(lines[0].split(" ", 2)[1])
        if status < 200:  # informational: the real head follows
            return self._head()
        self._response = Response(status, headers)
        self._chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        if not self._chunked and "content-length" in headers:
            self._length = int(headers["content-length"])
        if headers.get("connection", "").lower() == "close":
            self.reusable = False
        return True

    def _body(self, now: float) -> None:
        if self._chunked:
            self._chunks(now)
            return
        piece = bytes(self._buffer if self._length is None else self._buffer[: self._length])
        del self._buffer[: len(piece)]
        self._deliver(piece, now)
        if self._length is not None:
            self._length -= len(piece)
            if self._length == 0:
                self._finish()

    def _chunks(self, now: float) -> None:
        pieces, at, buffer = [], 0, self._buffer
        last = False
        while (end := buffer.find(b"\r\n", at)) >= 0:
            size = int(buffer[at:end].split(b";", 1)[0], 16)
            if size < 0:
                raise ValueError(f"a chunk of {size} bytes")
            if len(buffer) < end + 2 + size + 2:
                break
            pieces.append(bytes(buffer[end + 2 : end + 2 + size]))
            at = end + 2 + size + 2
            if size == 0:
                last = True
                break
        del buffer[:at]
        self._deliver(b"".join(pieces), now)
        if last:
            self.reusable = self.reusable and not buffer  # trailers would be read as the next head
            self._finish()

    def _deliver(self, piece: bytes, now: float) -> None:
        assert self._response is not None
        if piece and self._sink is not None and self._response.status == 200:
            self._sink(piece, now)
        else:
            self._response.body += piece

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            assert self._response is not None
            self._done.set_result(self._response)

    def _fail(self, why: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(HttpError(why))


class Client:
    """Requests to one server over as many kept connections as run at a time."""

    def __init__(self, base_url: str, headers: dict[str, str] | None = None):
        try:
            url = urlsplit(base_url)
            host, port = url.hostname, url.port or (443 if url.scheme == "https" else 80)
        except ValueError:  # of a port or an IPv6 address
            url, host, port = urlsplit(""), None, 0
        if url.scheme not in ("http", "https") or not host:
            raise ConfigError(f"the base URL must look like http://127.0.0.1:8000, got {base_url!r}")
        self.host, self.port = host, port
        self.path = url.path.rstrip("/").removesuffix(
            "/v1"
        )  # clients of the API have it in the base URL; paths here too
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        self._headers = {"Host": url.netloc, "User-Agent": "tuili-bench", **(headers or {})}
        self._idle: list[tuple[Exchange, float]] = []

    async def connect(self) -> Exchange:
        """A kept connection, or a new one; HttpError when nobody listens."""
        while self._idle:
            exchange, since = self._idle.pop()
            if exchange.reusable and time.perf_counter() - since < IDLE_SECONDS:
                return exchange
            exchange.abort()
        loop = asyncio.get_running_loop()
        try:
            _, exchange = await loop.create_connection(Exchange, self.host, self.port, ssl=self._tls)
        except OSError as error:
            raise HttpError(f"cannot connect to {self.host}:{self.port}: {error.strerror or error}") from error
        return exchange

    def message(self, method: str, path: str, body: bytes = b"", content_type: str = "application/json") -> bytes:
        """The bytes of a request."""
        headers = dict(self._headers)
        if body or method == "POST":
            headers |= {"Content-Type": content_type, "Content-Length": str(len(body))}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"{method} {self.path}{path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body

    async def request(self, method: str, path: str, body: bytes = b"", sink: Sink | None = None) -> Response:
        """Send and wait for the end of the answer; cancelling drops the connection."""
        exchange = await self.connect()
        try:
            response = await exchange.send(self.message(method, path, body), sink)
        except BaseException:
            exchange.abort()
            raise
        if exchange.reusable:
            self._idle.append((exchange, time.perf_counter()))
        else:
            exchange.abort()
        return response

    def close(self) -> None:
        for exchange, _ in self._idle:
            exchange.abort()
        self._idle.clear()
