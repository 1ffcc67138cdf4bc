"""How requests reach an engine and updates come back: the engine runs in a thread of its own.

A client hands out streams: ``generate`` one for an asyncio loop, ``read`` one for a thread that waits. Every accepted
request ends in its last update or in a typed error raised by its stream (law 7). Closing a stream aborts what is left
of its requests; their blocks are free before the next step.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Protocol

from tuili.base.clock import Clock
from tuili.base.errors import EngineDead, RequestFailed, TuiliError
from tuili.base.log import get
from tuili.core.request import Request, Update
from tuili.engine.engine import Engine, Listener, Snapshot

log = get(__name__)
CLOSED = "the engine was closed before the request was done"
FORKED = "the process was forked while the engine was at work; fork before the first request, or when all are done"
#: Seconds between two looks whether the engine's thread is still there, for who waits for it to let go of requests.
LOOK = 0.1
#: Seconds without work after which the books are checked.
IDLE = 1.0
#: Seconds for which news of requests that go on are kept together, for who waits for their end.
PAUSE = 0.05


class EngineClosed(EngineDead):
    """The engine was closed on purpose; the process may exit with zero."""


class EngineClient(Protocol):
    """What servers and offline use know of an engine, in whatever thread or process it runs."""

    #: The engine's clock.
    clock: Clock
    #: Called after each step, not in the caller's thread.
    listeners: list[Listener]

    def generate(self, requests: Sequence[Request]) -> AsyncStream:
        """Call in a running asyncio loop; the stream belongs to that loop. All ``requests`` are accepted, or none."""
        ...

    def read(self) -> BlockingStream:
        """A stream for this thread; ``add`` puts requests in."""
        ...

    def snapshot(self) -> Snapshot: ...

    def healthy(self) -> bool:
        """False once the engine is dead or closed: every request from then on raises EngineDead."""
        ...

    def close(self) -> None:
        """Stop the engine and free the device; what still runs ends in EngineClosed. Safe to call twice."""
        ...


Item = Update | Exception


class Stream:
    """The updates of requests, as they come, for one consumer.

    Iterating raises what ended it, and aborts what is left then: RequestError or OverloadedError when requests were not
    accepted (none that was added with them is), EngineDead at any time.
    """

    def __init__(self, client: ThreadClient):
        self._client = client
        self._open: set[str] = set()
        self._items: deque[Item] = deque()

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    @property
    def home(self) -> Hashable:
        """What is delivered to streams of one home is delivered at once."""
        raise NotImplementedError

    def due(self, items: list[tuple[Stream, Item]]) -> bool:
        """Whether to deliver ``items`` after this step; else they wait for those of the next."""
        return True

    def deliver(self, items: list[tuple[Stream, Item]]) -> None:
        """From the engine's thread: ``items`` for streams of this home. RuntimeError when it is gone."""
        raise NotImplementedError

    def push(self, item: Item) -> None:
        self._items.append(item)

    def add(self, requests: Sequence[Request]) -> None:
        """Ask for all of ``requests``, or for none when one of them cannot be accepted."""
        self._open.update(request.id for request in requests)
        self._client.submit(self, requests)

    def abort(self, id: str) -> None:
        """End one request; no update of it is needed any more."""
        if id in self._open:
            self._open.discard(id)
            self._client.drop(self, [id])

    def close(self) -> None:
        """Abort all that has not ended. Safe to call twice."""
        if self._open:
            self._client.drop(self, list(self._open))
            self._open.clear()

    def _take(self) -> Update | None:
        """The next update, or None when it has yet to come."""
        while self._items:
            item = self._items.popleft()
            if isinstance(item, Exception):
                self.close()
                raise item
            if item.id in self._open:  # else it was on its way when its request was aborted
                if item.finish is not None:
                    self._open.discard(item.id)
                return item
        return None


class AsyncStream(Stream):
    """A stream whose items arrive in its loop."""

    def __init__(self, client: ThreadClient, loop: asyncio.AbstractEventLoop):
        super().__init__(client)
        self._loop = loop
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Update:
        while self._open:
            if (update := self._take()) is not None:
                return update
            if self._open:
                await self._wait()
        raise StopAsyncIteration

    def _wait(self) -> Awaitable[None]:
        self._waiter = self._loop.create_future()
        return self._waiter

    def push(self, item: Item) -> None:
        super().push(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def home(self) -> Hashable:
        return self._loop

    def deliver(self, items: list[tuple[Stream, Item]]) -> None:
        self._loop.call_soon_threadsafe(_hand_over, items)


class BlockingStream(Stream):
    """A stream for a thread that waits for it, most of all for the end of a request: what comes before is kept together
    for ``PAUSE`` seconds, since each delivery takes two changes of threads.

    An interrupt may come at any moment: ``close`` leaves nothing behind.
    """

    def __init__(self, client: ThreadClient):
        super().__init__(client)
        self._hurried = False
        self._looked, self._delivered = 0, 0.0
        self._steps: SimpleQueue[list[tuple[Stream, Item]]] = SimpleQueue()

    def __iter__(self) -> BlockingStream:
        return self

    def __next__(self) -> Update:
        while self._open:
            if (update := self._take()) is not None:
                return update
            if self._open:
                _hand_over(self._steps.get())
        raise StopIteration

    def close(self) -> None:
        """Abort all that has not ended, and wait until the engine holds nothing of it: for the step in flight."""
        if self._open:
            gone = threading.Event()
            self._client.drop(self, list(self._open), gone)
            self._open.clear()
            while self._client.healthy() and not gone.wait(LOOK):
                pass

    def add(self, requests: Sequence[Request]) -> None:
        self._hurried = self._hurried or any(request.params.stop for request in requests)  # the reader ends those
        super().add(requests)

    @property
    def home(self) -> Hashable:
        return self

    def due(self, items: list[tuple[Stream, Item]]) -> bool:
        new, self._looked = items[self._looked :], len(items)
        if self._hurried or time.monotonic() - self._delivered >= PAUSE:
            return True
        return any(isinstance(item, Exception) or item.finish is not None for _, item in new)

    def deliver(self, items: list[tuple[Stream, Item]]) -> None:
        self._looked, self._delivered = 0, time.monotonic()
        self._steps.put(items)


def _hand_over(items: list[tuple[Stream, Item]]) -> None:
    for stream, item in items:
        stream.push(item)


class ThreadClient:
    """The engine runs in a thread of its own; consumers live in as many loops and threads as they like.

    Requests and aborts go in through a deque (appending needs no lock); an idle engine sleeps until something is put
    there. Updates go out with one wake-up per step and home, however many streams that has: at hundreds of streams a
    wake-up per token would cost more than the step. A child of ``fork`` starts a thread of its own when it first asks
    for something.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.clock = engine.clock
        self.listeners = engine.listeners
        self._inbox: deque[Callable[[], None]] = deque()
        self._streams: dict[str, Stream] = {}  # of the engine's thread, like the next two
        self._outbox: dict[Hashable, list[tuple[Stream, Item]]] = defaultdict(list)
        self._leaving: list[tuple[Sequence[str], threading.Event]] = []
        self._stopping = False
        #: Why nothing is accepted any more; set before the last look into the inbox.
        self._ended: EngineDead | None = None
        self._start()

    def _start(self) -> None:
        self._asleep = False
        self._process = os.getpid()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tuili-engine", daemon=True)
        self._thread.start()

    def generate(self, requests: Sequence[Request]) -> AsyncStream:
        stream = AsyncStream(self, asyncio.get_running_loop())
        stream.add(requests)
        return stream

    def read(self) -> BlockingStream:
        return BlockingStream(self)

    def snapshot(self) -> Snapshot:
        return self.engine.snapshot()

    def healthy(self) -> bool:
        return self._ended is None and not self._stopping and self.engine.dead is None

    def close(self) -> None:
        self._stopping = True
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def submit(self, stream: Stream, requests: Sequence[Request]) -> None:
        self._send(partial(self._accept, stream, requests))
        if self._ended is not None:  # the engine's thread may be past its last look into the inbox
            stream.push(_copy(self._ended))

    def drop(self, stream: Stream, ids: Sequence[str], gone: threading.Event | None = None) -> None:
        """Abort those of ``ids`` that are the stream's; ``gone`` is set when the engine holds nothing of them."""
        self._send(partial(self._drop, stream, ids, gone))

    def _send(self, command: Callable[[], None]) -> None:
        if self._process != os.getpid():
            self._take_over()
        self._inbox.append(command)
        self._wake.set()

    def _take_over(self) -> None:
        """In a forked child, where the engine's thread is not: start one, if the engine was at rest."""
        self._inbox.clear()
        if self._asleep and self._ended is None:
            self._start()
        else:
            self._process = os.getpid()
            self._ended = self._ended or EngineDead(FORKED)

    # ------------------------------------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        try:
            while not self._stopping and self._ended is None:
                self._read_inbox()
                busy = self.engine.has_work
                if busy:
                    for update in self.engine.step():
                        self._route(update)
                self._deliver()
                self._release()
                if not busy:
                    self._sleep()
                self._wake.clear()
            self._end(self._ended or EngineClosed(CLOSED))
        except EngineDead as dead:
            log.critical("%s", dead, exc_info=dead.__cause__)
            self._end(dead)
        except BaseException as error:
            log.critical("the engine's thread died", exc_info=error)
            self._end(EngineDead(f"the engine's thread died: {type(error).__name__}: {error}"))
            raise

    def _sleep(self) -> None:
        """Until something is asked. Where nothing is for a while, the engine's books are checked."""
        self._asleep = True
        if not self._wake.wait(IDLE):
            self.engine.check_integrity()
            self._wake.wait()
        self._asleep = False

    def _read_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _accept(self, stream: Stream, requests: Sequence[Request]) -> None:
        """Add all of ``requests``, or none."""
        added: list[str] = []
        try:
            for request in requests:
                self.engine.add(request)
                added.append(request.id)
        except Exception as error:
            for id in added:
                self.engine.abort(id)
            known = isinstance(error, TuiliError)
            self._post(stream, _copy(error) if known else RequestFailed(f"the request could not be added: {error!r}"))
            return
        self._streams.update(dict.fromkeys(added, stream))

    def _drop(self, stream: Stream, ids: Iterable[str], gone: threading.Event | None = None) -> None:
        own = [id for id in ids if self._streams.get(id) is stream]
        for id in own:
            del self._streams[id]
            self.engine.abort(id)
        if gone is not None:
            self._leaving.append((own, gone))

    def _release(self) -> None:
        """Let those go who wait until what they aborted is gone: at depth 2 a plan in flight may mention it."""
        for ids, gone in self._leaving.copy():
            if not any(map(self.engine.holds, ids)):
                self._leaving.remove((ids, gone))
                gone.set()

    def _route(self, update: Update) -> None:
        stream = self._streams.get(update.id)
        if stream is None:  # aborted while its step was in flight
            return
        if update.finish is not None:
            del self._streams[update.id]
        self._post(stream, update)

    def _post(self, stream: Stream, item: Item) -> None:
        self._outbox[stream.home].append((stream, item))

    def _deliver(self) -> None:
        for home, items in list(self._outbox.items()):
            stream = items[0][0]
            if not stream.due(items):
                continue
            del self._outbox[home]
            try:
                stream.deliver(items)
            except RuntimeError:  # that loop is closed: nobody is left to read
                for lost in {lost for lost, _ in items}:
                    self._drop(lost, [id for id, owner in self._streams.items() if owner is lost])

    def _end(self, why: EngineDead) -> None:
        """Nothing runs any more: everybody who waits is told, and who comes from now on is told at once."""
        self._ended = why
        if self.engine.dead is None:
            self.engine.dead = why
        self._read_inbox()
        for stream in set(self._streams.values()):
            self._post(stream, _copy(why))
        self._streams.clear()
        self._deliver()
        self._release()
        self.engine.close()


def _copy(error: Exception) -> Exception:
    """A fresh one for each consumer: raising shares the traceback otherwise."""
    twin = type(error)(*error.args)
    twin.__dict__.update(error.__dict__)
    return twin
