"""Every error in one shape: ``{"error": {message, type, param, code}}`` with vLLM's types (interfaces.md 5.1)."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from tuili.base.errors import EngineDead, OverloadedError, RequestError, RequestFailed

log = logging.getLogger(__name__)
Headers = tuple[tuple[bytes, bytes], ...]

TYPES = {
    400: "BadRequestError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    431: "RequestTooLargeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class HTTPRequestError(RequestError):
    """A request that is wrong at the level of HTTP: method (405), too large (413), of another media type (415)."""

    def __init__(self, message: str, status: int, headers: Mapping[bytes, bytes] | None = None):
        super().__init__(message)
        self.status = status
        self.headers = tuple((headers or {}).items())


class ShuttingDown(OverloadedError):
    """The server stops: what still runs after the grace period ends with this (HTTP 503)."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down; send the request again to another one", retry_after=5.0)


class ClientGone(Exception):
    """The client closed the connection: there is nobody left to answer."""


def body(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": TYPES.get(status, "APIError"), "param": param, "code": status}}


def describe(error: Exception) -> tuple[int, dict[str, Any], Headers]:
    """Status, JSON body and extra headers of an error. What was not raised on purpose is logged with its traceback."""
    if isinstance(error, RequestError):
        return error.status, body(str(error), error.status, error.param), getattr(error, "headers", ())
    if isinstance(error, OverloadedError):
        return 503, body(str(error), 503), _retry_after(error.retry_after)
    if isinstance(error, EngineDead):
        return 503, body(str(error), 503), _retry_after(30)
    if isinstance(error, RequestFailed):
        return 500, body(str(error), 500), ()
    log.error("unexpected %s in a handler", type(error).__name__, exc_info=error)
    return 500, body(f"internal error ({type(error).__name__}); the server's log has the details", 500), ()


def _retry_after(seconds: float) -> Headers:
    return ((b"retry-after", b"%d" % max(1, math.ceil(seconds))),)
