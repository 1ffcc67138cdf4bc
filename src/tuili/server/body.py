"""A request's body: read within limits, parsed strictly, checked against its model; every fault is a typed 4xx."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from tuili.base.errors import RequestError
from tuili.base.log import get
from tuili.server.errors import HTTPRequestError
from tuili.server.protocol import unknown
from tuili.server.wire import loads

log = get(__name__)
M = TypeVar("M", bound=BaseModel)

#: Seconds in which a body must have arrived.
BODY_SECONDS = 60.0


async def read(request: Request, model: type[M], limit: int) -> M:
    """The checked body; fields that nobody knows are named in the log and in the header ``x-tuili-warning``."""
    check_headers(request, limit)
    found = validated(loads(await _bytes(request, limit)), model)
    names = unknown(found)
    if names:
        listed = ", ".join(repr(name[:60]) for name in names[:20])
        request.scope["state"]["warning"] = f"ignored unknown fields: {listed}"
        log.warning("%s: ignored unknown fields %s", request.url.path, listed)
    return found


def check_headers(request: Request, limit: int) -> None:
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise HTTPRequestError(f"the body must be application/json, got {kind[:100]!r}", 415)
    coding = request.headers.get("content-encoding", "identity").lower()
    if coding != "identity":
        raise HTTPRequestError(f"the body must not be encoded, got content-encoding {coding[:100]!r}", 415)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limit:
        raise _too_large(limit)


async def _bytes(request: Request, limit: int) -> bytes:
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise _too_large(limit)
                parts.append(part)
    except TimeoutError as error:
        raise HTTPRequestError(f"the body did not arrive within {BODY_SECONDS:g} s", 408) from error
    except ClientDisconnect as error:
        raise HTTPRequestError("the client left before the body had arrived", 408) from error
    return b"".join(parts)


def _too_large(limit: int) -> HTTPRequestError:
    return HTTPRequestError(f"the body is larger than {limit} bytes (--max-body-bytes)", 413)


def validated(value: dict[str, Any], model: type[M]) -> M:
    """The model of ``value``. RequestError with the path of the field at fault, such as ``messages.0.content``."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        path, message = max(((_path(value, fault), fault["msg"]) for fault in faults), key=lambda found: len(found[0]))
        param = ".".join(str(part) for part in path)
        others = sorted({str(fault["loc"][0]) for fault in faults if fault["loc"]} - {str(part) for part in path[:1]})
        more = f" (also wrong: {', '.join(others[:10])})" if others else ""
        raise RequestError(f"{param}: {message}{more}" if param else message, param or None) from error


def _path(value: Any, fault: Any) -> list[str | int]:
    """The fault's place as far as it is in the body: pydantic adds the names of union members, which nobody sent."""
    path: list[str | int] = []
    for part in fault["loc"]:
        missing = fault["type"] == "missing" and part == fault["loc"][-1] and isinstance(value, dict)
        if not missing:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                continue
        path.append(part)
    return path
