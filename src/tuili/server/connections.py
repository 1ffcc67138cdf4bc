"""Limits of connections, whatever parses them: h11 or httptools, both as uvicorn has them.

Silence and slowness have an end: a head, a body and the taking of an answer each have a deadline, heads a size, and
connections a number; at the limit the one that has waited longest without a request makes room. Bytes are read in small
pieces, because a hostile piece (thousands of chunks or of pipelined requests) keeps the event loop until it is parsed;
what is written within one turn of the loop goes out as one piece.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

from tuili.base.config import Config
from tuili.base.errors import ConfigError
from tuili.server import errors
from tuili.server.wire import dumps

#: Bytes that are read and parsed at a time.
READ_BYTES = 8192


@dataclass(frozen=True, slots=True)
class Limits:
    """Of all connections, and of each: bytes and headers of a head, seconds for a head, a body, taking an answer."""

    connections: int
    head_bytes: int
    headers: int
    head_seconds: float
    body_seconds: float
    write_seconds: float


def protocol(name: str, config: Config, connections: int) -> type[asyncio.BaseProtocol]:
    """The class that uvicorn makes a connection of: its own for ``name`` (h11, httptools, or auto), guarded."""
    limits = Limits(
        connections,
        config.h11_max_incomplete_event_size,
        config.h11_max_header_count,
        config.timeout_header,
        config.timeout_body,
        config.timeout_write,
    )
    return type("Connection", (Guard, parser(name)), {"limits": limits})


def parser(name: str) -> type[asyncio.Protocol]:
    if name != "h11":
        try:
            from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
        except ImportError as error:
            if name == "httptools":
                raise ConfigError("httptools is not installed; pip install 'tuili[fast]'") from error
        else:
            return HttpToolsProtocol
    return H11Protocol


class Guard(asyncio.BufferedProtocol):
    """Goes before uvicorn's class; looks at nothing of it but its ``cycle``, the exchange of the latest head."""

    limits: Limits
    # of uvicorn's classes
    cycle: Any
    headers: list[tuple[bytes, bytes]] | None
    connections: set[Any]
    loop: asyncio.AbstractEventLoop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.corked = Corked(cast(asyncio.Transport, transport), self.loop)
        super().connection_made(cast(asyncio.Transport, self.corked))
        self._buffer = bytearray(READ_BYTES)
        self._size = 0  # bytes of a head that is not complete
        self._heard = self.loop.time()
        self._read_by = self._heard + self.limits.head_seconds
        self._write_by = math.inf
        if len(self.connections) > self.limits.connections and not self._displace():
            self.refuse(503, f"the server has its {self.limits.connections} connections (--limit-concurrency)")

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        self.data_received(bytes(memoryview(self._buffer)[:count]))

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)  # type: ignore[misc]
        if self.corked.is_closing():
            return
        self._heard = self.loop.time()
        if self.headers is not None and len(self.headers) > self.limits.headers:  # trailers included
            self.refuse(431, f"the request has more than {self.limits.headers} headers (--h11-max-header-count)")
            return
        if self.cycle is not before:
            self._size = 0
            self._read_by = self._heard + self.limits.body_seconds
        if not self.idle:
            if not self.cycle.more_body:
                self._read_by = math.inf
            return
        if self._size == 0:
            self._read_by = self._heard + self.limits.head_seconds
        self._size += len(data)
        if self._size > self.limits.head_bytes:
            limit = f"{self.limits.head_bytes} bytes (--h11-max-incomplete-event-size)"
            self.refuse(431, f"the head of the request is larger than {limit}")

    def on_message_complete(self) -> None:
        """httptools' callback; uvicorn's own does not look at the end of a body that was answered before it."""
        super().on_message_complete()  # type: ignore[misc]
        self.cycle.more_body = False

    @property
    def idle(self) -> bool:
        """Between two requests, or within a head."""
        return self.cycle is None or (self.cycle.response_complete and not self.cycle.more_body)

    def pause_writing(self) -> None:
        self._write_by = self.loop.time() + self.limits.write_seconds
        super().pause_writing()

    def resume_writing(self) -> None:
        self._write_by = math.inf
        super().resume_writing()

    def check(self, now: float) -> None:
        """End the connection if a deadline is over; the client is told where it may still listen."""
        if self.corked.is_closing() and math.isinf(self._write_by):
            self._write_by = now + self.limits.write_seconds
        if now > self._write_by:
            self.corked.abort()
        elif now > self._read_by and not self.corked.is_closing():
            if self.idle and self._size == 0:
                self.corked.close()
            elif self.idle:
                self.refuse(408, f"the head did not arrive within {self.limits.head_seconds:g} s (--timeout-header)")
            else:
                self.refuse(408, f"the body did not arrive within {self.limits.body_seconds:g} s (--timeout-body)")

    def refuse(self, status: int, message: str) -> None:
        """Answer for the app, which has not begun to, and close."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.corked.abort()  # nothing may be put into an answer that has begun
            return
        content = dumps(errors.body(message, status))
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        self.corked.write(f"{head}content-length: {len(content)}\r\nconnection: close\r\n\r\n".encode() + content)
        self.corked.close()
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def send_400_response(self, message: str) -> None:
        self.refuse(400, message)

    def _displace(self) -> bool:
        """Close the connection that has been idle longest, if one is."""
        idle = [other for other in self.connections if other is not self and other.idle]
        if not idle:
            return False
        oldest = min(idle, key=lambda other: other._heard)
        oldest.corked.close()
        self.connections.discard(oldest)
        return True


def check_all(connections: Iterable[Any], now: float) -> None:
    """Call a few times a second: no timer per connection, none per request."""
    for connection in list(connections):
        connection.check(now)


class Corked:
    """A transport that writes once per turn of the event loop, whatever is written in it."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop):
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def _flush(self) -> None:
        if self._parts:
            self._transport.write(b"".join(self._parts))
            self._parts.clear()

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        self._parts.clear()
        self._transport.abort()
