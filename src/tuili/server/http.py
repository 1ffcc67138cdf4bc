"""One HTTP exchange over ASGI: a request, its body within limits, and one answer, whole or as server-sent events.

Plain ASGI and no framework: an answer that takes its time costs one more task, which watches whether the client leaves.
Connections, their deadlines and the size of heads are the subject of ``connections.py``.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, MutableMapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from tuili.base.errors import OverloadedError
from tuili.server import errors
from tuili.server.wire import DONE, dumps, event

T = TypeVar("T")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]

REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
WARNING_LENGTH = 1000
#: Bytes up to which a body needs no room: uvicorn holds as much for any connection.
SMALL_BODY = 64 << 10
JSON: Header = (b"content-type", b"application/json")
EVENTS: tuple[Header, ...] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


@dataclass(slots=True)
class BodyRoom:
    """Bytes that the larger bodies may still take, all together, until they are parsed."""

    left: int

    def take(self, size: int) -> None:
        """OverloadedError when there is no room for ``size`` bytes more."""
        if size > self.left:
            raise OverloadedError("too many large bodies arrive at once; send the request again later")
        self.left -= size


@dataclass(frozen=True, slots=True)
class Response:
    """A whole answer."""

    body: bytes = b""
    status: int = 200
    headers: tuple[Header, ...] = ()


def as_json(content: Any, status: int = 200, headers: Sequence[Header] = ()) -> Response:
    return Response(dumps(content), status, (JSON, *headers))


class Exchange:
    """A request and its answer. ``id`` is the header ``x-request-id`` if it is printable ASCII, else new; the answer
    repeats it. ``warning`` becomes the header ``x-tuili-warning``, ``extra`` are headers of every answer."""

    def __init__(self, scope: Message, receive: Receive, send: Send):
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.id = request_id(self.headers.get(b"x-request-id", b""))
        self.rest = ""  # of the path, where a route takes any
        self.warning = ""
        self.extra: Sequence[Header] = ()
        self.status = 0  # of the answer, once it has begun
        self.taken = 0  # bytes of the room for bodies
        self.receive = receive
        self._send = send

    async def body(self, limit: int, room: BodyRoom) -> bytes:
        """RequestError (413) when it has more than ``limit`` bytes, ClientGone when it ends before its end.

        What it takes of ``room`` is in ``taken``, and the caller's to give back.
        """
        length = self.headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > limit:
            raise _too_large(limit)
        parts, size, more = [], 0, True
        while more:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise errors.ClientGone
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            if size > SMALL_BODY:
                room.take(len(part))
                self.taken += len(part)
            parts.append(part)
        return b"".join(parts)

    async def respond(self, answer: Response) -> None:
        await self._start(answer.status, [*answer.headers, (b"content-length", b"%d" % len(answer.body))])
        body = b"" if self.method == "HEAD" else answer.body
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def fail(self, error: Exception) -> None:
        """Answer ``error``, if no answer has begun."""
        if self.status:
            raise error
        status, content, headers = errors.describe(error)
        await self.respond(as_json(content, status, headers))

    async def stream(self, events: AsyncGenerator[bytes, None], flight: InFlight) -> None:
        """Server-sent events. An error before the first is raised, a later one becomes an event; the last is [DONE]."""
        try:
            await flight.run(self._send_events(events), self.receive)
            last = DONE
        except errors.ClientGone:
            raise
        except Exception as error:
            if not self.status:
                raise
            last = event(errors.describe(error)[1]) + DONE
        await self._send({"type": "http.response.body", "body": last, "more_body": False})

    async def _send_events(self, events: AsyncGenerator[bytes, None]) -> None:
        async with aclosing(events):
            async for item in events:
                if not self.status:
                    await self._start(200, EVENTS)
                await self._send({"type": "http.response.body", "body": item, "more_body": True})

    async def _start(self, status: int, headers: Sequence[Header]) -> None:
        own: list[Header] = [(b"x-request-id", self.id.encode("ascii"))]
        if self.warning:
            own.append((b"x-tuili-warning", header_value(self.warning)))
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, *own, *self.extra]})


def _too_large(limit: int) -> errors.HTTPRequestError:
    return errors.HTTPRequestError(f"the body is larger than {limit} bytes (--max-body-bytes)", 413)


def request_id(given: bytes) -> str:
    return given.decode("ascii") if REQUEST_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"


def header_value(text: str) -> bytes:
    """What a header can hold: one line of printable ASCII, bounded."""
    printable = (
        char if " " <= char <= "~" else char.encode("unicode_escape", "backslashreplace").decode() for char in text
    )
    return "".join(printable).encode("ascii", "replace")[:WARNING_LENGTH]


class InFlight:
    """The generations that run now: each ends when its client leaves, or with a typed error when the server stops."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[Any]] = set()
        self.stopping = False

    def __len__(self) -> int:
        return len(self.tasks)

    def stop(self) -> None:
        self.stopping = True
        for task in self.tasks:
            task.cancel()

    async def run(self, work: Coroutine[Any, Any, T], receive: Receive) -> T:
        """The result of ``work``. Raises ClientGone or ShuttingDown after having cancelled it."""
        if self.stopping:
            work.close()
            raise errors.ShuttingDown
        task = asyncio.current_task()
        assert task is not None
        watch = asyncio.ensure_future(_cancel_when_gone(task, receive))
        self.tasks.add(task)
        try:
            return await work
        except asyncio.CancelledError:
            gone = watch.done() and not watch.cancelled()
            if not gone and not self.stopping:
                raise
            task.uncancel()
            raise errors.ClientGone if gone else errors.ShuttingDown from None
        finally:
            self.tasks.discard(task)
            watch.cancel()


async def _cancel_when_gone(task: asyncio.Task[Any], receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    task.cancel()
