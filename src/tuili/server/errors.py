"""Every error in one shape: ``{"error": {message, type, param, code}}`` with vLLM's types (interfaces.md 5.1)."""

from __future__ import annotations

import logging
import math
from typing import Any

from fastapi.responses import Response
from starlette.exceptions import HTTPException

from tuili.base.errors import EngineDead, OverloadedError, RequestError, RequestFailed
from tuili.server.wire import dumps

log = logging.getLogger(__name__)

TYPES = {
    400: "BadRequestError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class HTTPRequestError(RequestError):
    """A request that is wrong at the level of HTTP: too large (413), of another media type (415), too slow (408)."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class ShuttingDown(OverloadedError):
    """The server stops: what still runs after the grace period ends with this (HTTP 503)."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down; send the request again to another one", retry_after=5.0)


class ClientGone(Exception):
    """The client closed the connection: there is nobody left to answer."""


def body(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": TYPES.get(status, "APIError"), "param": param, "code": status}}


def describe(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, JSON body and extra headers of an error. What was not raised on purpose is logged with its traceback."""
    if isinstance(error, RequestError):
        return error.status, body(str(error), error.status, error.param), {}
    if isinstance(error, OverloadedError):
        return 503, body(str(error), 503), {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    if isinstance(error, EngineDead):
        return 503, body(str(error), 503), {"Retry-After": "30"}
    if isinstance(error, HTTPException):
        return error.status_code, body(str(error.detail), error.status_code), dict(error.headers or {})
    if isinstance(error, RequestFailed):
        return 500, body(str(error), 500), {}
    log.error("unexpected %s in a handler", type(error).__name__, exc_info=error)
    return 500, body(f"internal error ({type(error).__name__}); the server's log has the details", 500), {}


def response(error: Exception) -> Response:
    status, content, headers = describe(error)
    return Response(dumps(content), status, headers, media_type="application/json")
