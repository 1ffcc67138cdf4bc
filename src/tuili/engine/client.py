"""How requests reach an engine and updates come back: in the caller's thread, or from a thread of the engine's own.

A client's ``generate`` takes a group of requests (the n choices of one call) and gives a ``Stream`` of their updates.
Every accepted request ends in its last update or in a typed error raised by the stream (law 7). Closing a stream, or
dropping out of it, aborts what is left of its requests; their blocks are free before the next step.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

from tuili.base.errors import EngineDead, RequestFailed, TuiliError
from tuili.base.log import get
from tuili.core.request import Request, Update
from tuili.engine.engine import Engine

log = get(__name__)
CLOSED = "the engine was closed before the request was done"


class EngineClosed(EngineDead):
    """The engine was closed on purpose; the process may exit with zero."""


class Stream:
    """The updates of a group of requests, as they come. An async iterator for one consumer.

    Iterating raises what ended the group: RequestError or OverloadedError before the first update, when a request was
    not accepted (then none of the group is), EngineDead at any time.
    """

    def __init__(self, requests: Sequence[Request], abort: Callable[[Iterable[str]], None]):
        self.requests = tuple(requests)
        self._open = {request.id for request in requests}
        self._abort = abort
        self._items: deque[Update | Exception] = deque()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Update:
        while self._open:
            if not self._items:
                await self._wait()
                continue
            item = self._items.popleft()
            if isinstance(item, Exception):
                self._open.clear()
                raise item
            if item.id in self._open:  # else it was on its way when its request was aborted
                if item.finish is not None:
                    self._open.discard(item.id)
                return item
        raise StopAsyncIteration

    def _wait(self) -> Awaitable[None]:
        """Done when there may be something new."""
        raise NotImplementedError

    def push(self, item: Update | Exception) -> None:
        self._items.append(item)

    def abort(self, id: str) -> None:
        """End one request of the group; no update of it is needed any more."""
        if id in self._open:
            self._open.discard(id)
            self._abort([id])

    def close(self) -> None:
        """Abort all that has not ended. Safe to call twice."""
        if self._open:
            ids = list(self._open)
            self._open.clear()
            self._abort(ids)


class EngineClient(Protocol):
    engine: Engine

    def generate(self, requests: Sequence[Request]) -> Stream: ...

    def close(self) -> None:
        """Stop the engine and free the device; what still runs ends in EngineClosed."""
        ...


class InlineClient:
    """The engine runs in the caller's thread: whoever waits for an update makes a step. For tests and offline use."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._streams: dict[str, Stream] = {}
        self._closed = False

    def generate(self, requests: Sequence[Request]) -> Stream:
        stream = _InlineStream(requests, self._abort, self.step)
        if self._closed:
            stream.push(EngineClosed(CLOSED))
        else:
            _accept(self.engine, stream, self._streams)
        return stream

    def step(self) -> list[Update]:
        """One step; its updates also go to their streams."""
        try:
            updates = self.engine.step()
        except EngineDead as dead:
            _end_all(self._streams, dead)
            raise
        for update in updates:
            _route(self._streams, update, Stream.push)
        return updates

    def _abort(self, ids: Iterable[str]) -> None:
        for id in ids:
            if self._streams.pop(id, None) is not None:
                self.engine.abort(id)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            _end_all(self._streams, EngineClosed(CLOSED))
            self.engine.close()


class _InlineStream(Stream):
    def __init__(self, requests: Sequence[Request], abort: Callable[[Iterable[str]], None], step: Callable[[], object]):
        super().__init__(requests, abort)
        self._step = step

    async def _wait(self) -> None:
        self._step()
        await asyncio.sleep(0)  # let other consumers take what this step made


class ThreadClient:
    """The engine runs in a thread of its own; consumers live in asyncio loops, in as many threads as they like.

    Requests and aborts go in through a deque (appending needs no lock); an idle engine sleeps until something is put
    there. Updates go out with one wake-up per step and loop, however many streams that loop has: at hundreds of streams
    a wake-up per token would cost more than the step.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._streams: dict[str, Stream] = {}  # of the engine's thread, like all below
        self._outbox: dict[asyncio.AbstractEventLoop, list[tuple[_LoopStream, Update | Exception]]] = defaultdict(list)
        self._stopping = False
        #: Why nothing is accepted any more; set before the last look into the inbox.
        self._ended: EngineDead | None = None
        self._thread = threading.Thread(target=self._run, name="tuili-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._ended is None

    def generate(self, requests: Sequence[Request]) -> Stream:
        """Call in a running asyncio loop; the stream belongs to that loop."""
        stream = _LoopStream(requests, self._abort, asyncio.get_running_loop())
        self._send(lambda: self._add(stream))
        if self._ended is not None:  # the engine's thread may be past its last look into the inbox
            stream.push(_copy(self._ended))
        return stream

    def close(self) -> None:
        self._stopping = True
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _send(self, command: Callable[[], None]) -> None:
        self._inbox.append(command)
        self._wake.set()

    def _abort(self, ids: Iterable[str]) -> None:
        self._send(lambda: self._drop(ids))

    # ------------------------------------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._read_inbox()
                if self.engine.has_work:
                    for update in self.engine.step():
                        _route(self._streams, update, self._post)
                    self._deliver()
                else:
                    self._deliver()
                    self._wake.wait()
                self._wake.clear()
            self._end(EngineClosed(CLOSED))
        except EngineDead as dead:
            log.critical("%s", dead, exc_info=dead.__cause__)
            self._end(dead)
        except BaseException as error:
            log.critical("the engine's thread died", exc_info=error)
            self._end(EngineDead(f"the engine's thread died: {type(error).__name__}: {error}"))
            raise

    def _read_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _add(self, stream: _LoopStream) -> None:
        _accept(self.engine, stream, self._streams, self._post)

    def _drop(self, ids: Iterable[str]) -> None:
        for id in ids:
            if self._streams.pop(id, None) is not None:
                self.engine.abort(id)

    def _end(self, why: EngineDead) -> None:
        """Nothing runs any more: everybody who waits is told, and who comes from now on is told at once."""
        self._ended = why
        if self.engine.dead is None:
            self.engine.dead = why
        self._read_inbox()
        _end_all(self._streams, why, self._post)
        self._deliver()
        self.engine.close()

    def _post(self, stream: Stream, item: Update | Exception) -> None:
        assert isinstance(stream, _LoopStream)
        self._outbox[stream.loop].append((stream, item))

    def _deliver(self) -> None:
        for loop, items in self._outbox.items():
            try:
                loop.call_soon_threadsafe(_hand_over, items)
            except RuntimeError:  # that loop is closed: nobody is left to read
                self._drop([request.id for stream, _ in items for request in stream.requests])
        self._outbox.clear()


class _LoopStream(Stream):
    """A stream whose items arrive in its loop."""

    def __init__(
        self, requests: Sequence[Request], abort: Callable[[Iterable[str]], None], loop: asyncio.AbstractEventLoop
    ):
        super().__init__(requests, abort)
        self.loop = loop
        self._waiter: asyncio.Future[None] | None = None

    def push(self, item: Update | Exception) -> None:
        super().push(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _wait(self) -> Awaitable[None]:
        self._waiter = self.loop.create_future()
        return self._waiter


def _hand_over(items: list[tuple[_LoopStream, Update | Exception]]) -> None:
    for stream, item in items:
        stream.push(item)


Push = Callable[[Stream, Update | Exception], None]


def _accept(engine: Engine, stream: Stream, streams: dict[str, Stream], push: Push = Stream.push) -> None:
    """Add all requests of ``stream``, or none."""
    added: list[str] = []
    try:
        for request in stream.requests:
            engine.add(request)
            added.append(request.id)
    except Exception as error:
        for id in added:
            engine.abort(id)
        known = isinstance(error, TuiliError)
        push(stream, _copy(error) if known else RequestFailed(f"the request could not be added: {error!r}"))
        return
    streams.update(dict.fromkeys(added, stream))


def _route(streams: dict[str, Stream], update: Update, push: Push) -> None:
    stream = streams.get(update.id)
    if stream is None:  # aborted while its step was in flight
        return
    if update.finish is not None:
        del streams[update.id]
    push(stream, update)


def _end_all(streams: dict[str, Stream], why: EngineDead, push: Push = Stream.push) -> None:
    for stream in set(streams.values()):
        push(stream, _copy(why))
    streams.clear()


def _copy(error: Exception) -> Exception:
    """A fresh one for each consumer: raising shares the traceback otherwise."""
    twin = type(error)(*error.args)
    twin.__dict__.update(error.__dict__)
    return twin
