"""ASGI middleware around every route: request ids, warnings, HTTP metrics, and the last net for exceptions."""

from __future__ import annotations

import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tuili.server import errors
from tuili.server.metrics import FrontendMetrics

REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
WARNING_LENGTH = 1000
METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"})


class Observe:
    """Plain ASGI: no task, no copy of the body, so that a stream costs nothing here.

    ``state.request_id`` is the header ``x-request-id`` if it is printable ASCII, else new; the answer repeats it.
    ``state.warning`` of a handler becomes the header ``x-tuili-warning``.
    """

    def __init__(self, app: ASGIApp, metrics: FrontendMetrics):
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["request_id"] = request_id(scope)
        status, began = 0, time.monotonic()

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *_headers(state)]}
            await send(message)

        try:
            await self.app(scope, receive, observed)
        except Exception as error:
            if status:
                raise
            await errors.response(error)(scope, receive, observed)
        finally:
            method = scope["method"] if scope["method"] in METHODS else "OTHER"
            code = 499 if state.get("gone") else status or 500
            self.metrics.http(_handler(scope), method, code, time.monotonic() - began)


def request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
            return value.decode("ascii")
    return uuid.uuid4().hex


def _headers(state: dict[str, str]) -> list[tuple[bytes, bytes]]:
    headers = [(b"x-request-id", state["request_id"].encode("ascii"))]
    if state.get("warning"):
        headers.append((b"x-tuili-warning", header_value(state["warning"])))
    return headers


def header_value(text: str) -> bytes:
    """What a header can hold: one line of printable ASCII, bounded."""
    printable = (
        char if " " <= char <= "~" else char.encode("unicode_escape", "backslashreplace").decode() for char in text
    )
    return "".join(printable).encode("ascii", "replace")[:WARNING_LENGTH]


def _handler(scope: Scope) -> str:
    """The route's template, not the path: a series per path would let clients fill the memory."""
    return getattr(scope.get("route"), "path", "none")
