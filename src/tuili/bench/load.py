"""Load: offer a workload to a sender, closed or open loop, and record what each request saw. Torch-free.

A sender is an OpenAI endpoint (``OpenAISender``) or an engine in this process (``bench.offline``). Times are seconds
after the start of the run. TTFT is the first piece of output, ITL the gaps between pieces, E2E the last piece; so E2E
= TTFT + sum of ITL. TPOT = (E2E - TTFT) / (output tokens - 1).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tuili.base.errors import TuiliError
from tuili.bench.http import Client
from tuili.bench.workload import Item


@dataclass(slots=True)
class Record:
    """What one request saw. ``due`` is when the workload wanted it, ``start`` when it was sent, ``end`` when all was
    closed.

    ``error`` is None for a completed request. ``estimated`` tells that the server sent no usage and pieces were
    counted.
    """

    index: int
    due: float
    start: float
    input_tokens: int
    output_tokens: int = 0
    cached_tokens: int = 0
    ttft: float = 0.0
    itls: list[float] = field(default_factory=list)
    e2e: float = 0.0
    end: float = 0.0
    finish_reason: str | None = None
    error: str | None = None
    estimated: bool = False

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None for one token."""
        return (self.e2e - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    def piece(self, now: float) -> None:
        """A piece of output arrived ``now`` seconds after the start of the run."""
        if self.ttft == 0.0:
            self.ttft = now - self.start
        else:
            self.itls.append(now - self.start - self.e2e)
        self.e2e = now - self.start


class Sender(Protocol):
    """Sends one item and fills its record as the answer comes; raises TuiliError or OSError when it fails.

    ``origin`` is the start of the run on ``time.perf_counter``.
    """

    async def __call__(self, item: Item, record: Record, origin: float) -> None: ...


@dataclass(frozen=True, slots=True)
class LoadRun:
    """All records of one run and its wall time in seconds.

    ``lanes`` is the most that may run side by side (0: no limit), ``peak`` the most that did, and ``live_seconds``
    the time integral of the number of live requests: the law "sum of parts = wall" compares it with the parts of the
    records.
    """

    records: list[Record]
    duration: float
    lanes: int
    peak: int
    live_seconds: float


async def offer(
    sender: Sender,
    items: Sequence[Item],
    *,
    concurrency: int | None = None,
    timeout: float = 600.0,
    done: Callable[[Record], None] = lambda record: None,
) -> LoadRun:
    """Send every item when it is due, at most ``concurrency`` at a time, and wait for all of them.

    A failure ends its own request only. With all arrivals 0 and a concurrency this is a closed loop.
    """
    origin = time.perf_counter()
    records: list[Record] = []
    queue = iter(enumerate(items))
    live = _Live()

    async def one(index: int, item: Item) -> None:
        record = Record(index, item.arrival, time.perf_counter() - origin, len(item.tokens))
        live.change(+1)
        try:
            async with asyncio.timeout(timeout):
                await sender(item, record, origin)
        except TimeoutError:
            record.error = f"no end after {timeout:g} s"
        except (TuiliError, OSError, ValueError) as error:
            record.error = f"{type(error).__name__}: {error}"
        live.change(-1)
        record.end = time.perf_counter() - origin
        records.append(record)
        done(record)

    async def lane() -> None:
        for index, item in queue:
            await _until(origin + item.arrival)
            await one(index, item)

    lanes = min(concurrency or 0, len(items))
    if lanes:
        await asyncio.gather(*(lane() for _ in range(lanes)))
    else:
        await _open(queue, origin, one)
    records.sort(key=lambda record: record.index)
    return LoadRun(records, time.perf_counter() - origin, lanes, live.peak, live.seconds)


class _Live:
    """How many requests are open, the most that were, and the integral over time."""

    def __init__(self) -> None:
        self.count, self.peak, self.seconds = 0, 0, 0.0
        self._since = time.perf_counter()

    def change(self, by: int) -> None:
        now = time.perf_counter()
        self.seconds += self.count * (now - self._since)
        self._since = now
        self.count += by
        self.peak = max(self.peak, self.count)


async def _open(queue: Any, origin: float, one: Callable[[int, Item], Any]) -> None:
    tasks = []
    for index, item in queue:
        await _until(origin + item.arrival)
        tasks.append(asyncio.create_task(one(index, item)))
    await asyncio.gather(*tasks)


async def _until(moment: float) -> None:
    if (wait := moment - time.perf_counter()) > 0:
        await asyncio.sleep(wait)


class Events:
    """Splits a server-sent event stream into the JSON text of its ``data:`` lines, whatever the split of the bytes."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + piece).replace(b"\r", b"\n").split(b"\n")
        return [data for line in lines if line.startswith(b"data:") and (data := line[5:].strip())]

    def end(self) -> list[bytes]:
        """The data of a last line that no newline ends, as some servers leave it."""
        return self.feed(b"\n")


class StreamFailed(TuiliError):
    """The server sent an error instead of, or inside, an answer."""


@dataclass(slots=True)
class OpenAISender:
    """Streams items from ``/v1/completions`` (token ids: exact lengths) or ``/v1/chat/completions`` (the words of the
    ids)."""

    client: Client
    model: str
    chat: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    ignore_eos: bool = True

    def body(self, item: Item) -> bytes:
        fields: dict[str, Any] = {"model": self.model, "max_tokens": item.max_tokens, "stream": True}
        fields |= {"stream_options": {"include_usage": True}, "temperature": 0.0}
        if self.ignore_eos:
            fields["ignore_eos"] = True
        if self.chat:
            fields["messages"] = [{"role": "user", "content": item.text}]
        else:
            fields["prompt"] = list(item.tokens)
        return json.dumps(fields | self.extra).encode()

    async def __call__(self, item: Item, record: Record, origin: float) -> None:
        path = "/v1/chat/completions" if self.chat else "/v1/completions"
        events, answer = Events(), _LoadAnswer(record)

        def sink(piece: bytes, now: float) -> None:
            for data in events.feed(piece):
                answer.event(data, now - origin)

        body = self.body(item)
        record.start = time.perf_counter() - origin
        response = await self.client.request("POST", path, body, sink)
        if response.status != 200:
            raise StreamFailed(f"HTTP {response.status}: {_message(bytes(response.body))}")
        for data in events.end():
            answer.event(data, record.start + record.e2e)
        answer.close()


class _LoadAnswer:
    """The events of one stream, written into its record."""

    def __init__(self, record: Record):
        self.record = record
        self.pieces = 0
        self.usage: dict[str, Any] | None = None
        self.ended = False
        self.error: str | None = None

    def event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.ended = True
            return
        message = json.loads(data)
        if not isinstance(message, dict) or message.get("error"):
            self.error = _message(data)
            return
        usage = message.get("usage")
        self.usage = usage if isinstance(usage, dict) and usage else self.usage
        for choice in filter(None, message.get("choices") or ()):
            finish = choice.get("finish_reason")
            if _content(choice) or (finish and self.record.ttft == 0.0):
                self.pieces += 1
                self.record.piece(now)
            self.record.finish_reason = finish or self.record.finish_reason

    def close(self) -> None:
        """Check that the stream ended as it must, and take the tokens from its usage."""
        record = self.record
        if self.error is not None:
            raise StreamFailed(self.error)
        if not self.ended and record.finish_reason is None:
            raise StreamFailed("the stream ended without [DONE]")
        if self.usage is None:
            record.output_tokens, record.estimated = self.pieces, True
            return
        record.input_tokens = _count(self.usage, "prompt_tokens") or record.input_tokens
        written = _count(self.usage, "completion_tokens")
        record.output_tokens, record.estimated = (self.pieces, True) if written is None else (written, False)
        record.cached_tokens = _count(self.usage.get("prompt_tokens_details"), "cached_tokens") or 0


def _count(usage: Any, name: str) -> int | None:
    """A number of tokens in a usage or its details; None where there is none."""
    value = usage.get(name) if isinstance(usage, dict) else None
    return int(value) if isinstance(value, int | float) else None


#: Fields of a delta that hold output.
WRITTEN = ("content", "reasoning", "reasoning_content", "refusal", "tool_calls")


def _content(choice: dict[str, Any]) -> Any:
    """What a choice of an event brings; empty where it brings none."""
    delta = choice.get("delta")
    if delta is None:
        return choice.get("text")
    return next((delta[name] for name in WRITTEN if delta.get(name)), None)


def _message(body: bytes) -> str:
    """The text of an OpenAI error envelope, or the start of whatever came instead."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace") or "no body"
