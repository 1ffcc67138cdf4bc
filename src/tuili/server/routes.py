"""What a route is: where it answers, how, and what the OpenAPI document says of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pydantic import BaseModel

from tuili.server.http import Exchange, Response
from tuili.server.service import Service

Handler = Callable[[Service, Exchange], Awaitable[Response | None]]
#: Statuses of a route that takes a body.
BODY_ERRORS = (400, 404, 408, 413, 415)


@dataclass(frozen=True)
class Route:
    """``handler`` returns a whole answer, or None when it has sent one. ``takes`` is the body's model, ``gives`` the
    answer's (None: no body; a string: that media type, as text), ``errors`` the statuses of its errors; with
    ``streams`` it may also answer in events."""

    method: str
    path: str
    handler: Handler
    gives: type[BaseModel] | str | None = None
    takes: type[BaseModel] | None = None
    errors: tuple[int, ...] = ()
    streams: bool = False
