"""Answers that take their time: JSON when done, or server-sent events. Both end at once when the client leaves or the
server stops, and closing what they wait for aborts it in the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tuili.server import errors
from tuili.server.wire import DONE, dumps, event

T = TypeVar("T")


class InFlight:
    """The generations that run now, so that a shutdown can end each of them with a typed error."""

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
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnected(receive))
        self.tasks.add(task)
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise errors.ClientGone
            if task.cancelled():
                raise errors.ShuttingDown
            return task.result()
        finally:
            self.tasks.discard(task)
            gone.cancel()
            task.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Answer(Response):
    """JSON, when ``work`` is done."""

    def __init__(self, work: Coroutine[Any, Any, dict[str, Any]], flight: InFlight):
        super().__init__(media_type="application/json")
        self.work = work
        self.flight = flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await self.flight.run(self.work, receive)
            reply = Response(dumps(answer), media_type="application/json")
        except errors.ClientGone:
            scope["state"]["gone"] = True
            return
        except Exception as error:
            reply = errors.response(error)
        await reply(scope, receive, send)


class EventStream(Response):
    """Server-sent events. An error before the first one is a plain HTTP error, later it is an event, then [DONE]."""

    def __init__(self, events: AsyncGenerator[bytes, None], flight: InFlight):
        super().__init__(media_type="text/event-stream")
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"
        del self.headers["content-length"]
        self.events = events
        self.flight = flight
        self.started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.flight.run(self._send_events(send), receive)
        except errors.ClientGone:
            scope["state"]["gone"] = True
        except Exception as error:
            if self.started:
                last = event(errors.describe(error)[1]) + DONE
                await send({"type": "http.response.body", "body": last, "more_body": False})
            else:
                await errors.response(error)(scope, receive, send)

    async def _send_events(self, send: Send) -> None:
        async with aclosing(self.events) as events:
            async for item in events:
                if not self.started:
                    self.started = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": item, "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})
