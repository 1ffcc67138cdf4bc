"""A tiny OpenAI server on asyncio for tests of the load generator: its delays and its misbehaviour are set by the
test."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class FakeServer:
    """Streams ``max_tokens`` pieces: the first after ``first`` seconds, then one every ``gap`` seconds.

    ``answer(index)`` may give a status and a body to refuse request number ``index`` with, or None. ``cut(index)``
    closes the connection after that many pieces. ``split`` sends the bytes of a stream in pieces of that size.
    ``stream`` is sent in place of the pieces.
    """

    first: float = 0.02
    gap: float = 0.005
    refuse: Callable[[int], tuple[int, str] | None] = lambda index: None
    cut: Callable[[int], int | None] = lambda index: None
    usage: bool = True
    split: int | None = None
    stream: str | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    url: str = ""
    live: int = 0
    peak: int = 0
    connections: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.headers.append(head)
                length = next(
                    (int(x.split(":")[1]) for x in head.split("\r\n") if x.lower().startswith("content-length")), 0
                )
                body = await reader.readexactly(length)
                if head.startswith("GET /v1/models"):
                    await self._plain(writer, 200, '{"object": "list", "data": [{"id": "fake"}]}')
                elif not await self._complete(writer, json.loads(body), "chat" in head.split(" ")[1]):
                    return
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _plain(self, writer: asyncio.StreamWriter, status: int, text: str) -> None:
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
        await writer.drain()

    async def _complete(self, writer: asyncio.StreamWriter, body: dict[str, Any], chat: bool) -> bool:
        index = len(self.bodies)
        self.bodies.append(body)
        if (refusal := self.refuse(index)) is not None:
            await self._plain(writer, *refusal)
            return True
        self.live += 1
        self.peak = max(self.peak, self.live)
        try:
            return await self._stream(writer, body, chat, self.cut(index))
        finally:
            self.live -= 1

    async def _stream(self, writer: asyncio.StreamWriter, body: dict[str, Any], chat: bool, cut: int | None) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n")
        if self.stream is not None:
            await self._bytes(writer, self.stream.encode())
            writer.write(b"0\r\n\r\n")
            return True
        if chat:
            await self._event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        count = body["max_tokens"]
        for number in range(count):
            if number == cut:
                return False
            await asyncio.sleep(self.gap if number else self.first)
            text = {"delta": {"content": "é "}} if chat else {"text": "é "}
            await self._event(writer, {"choices": [{"index": 0, **text, "finish_reason": None}]})
        await self._event(writer, {"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": "length"}]})
        if self.usage:
            prompt = len(body.get("prompt", ())) or 7
            details = {"cached_tokens": 3}
            usage = {"prompt_tokens": prompt, "completion_tokens": count, "prompt_tokens_details": details}
            await self._event(writer, {"choices": [], "usage": usage})
        await self._event(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    async def _event(self, writer: asyncio.StreamWriter, data: Any) -> None:
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
        await self._bytes(writer, f"data: {text}\n\n".encode())

    async def _bytes(self, writer: asyncio.StreamWriter, sent: bytes) -> None:
        step = self.split or len(sent)
        for at in range(0, len(sent), step):
            piece = sent[at : at + step]
            writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            await writer.drain()


@asynccontextmanager
async def running(server: FakeServer) -> AsyncIterator[FakeServer]:
    """The server on a free port of 127.0.0.1."""
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, backlog=512)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listener.close()
