"""What a route is, what every route works with, and what one call of a route is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import BaseModel

from tuili.base.config import Config
from tuili.base.errors import NotFoundError
from tuili.server.http import Exchange, InFlight, Response, as_json
from tuili.server.metrics import Metrics

if TYPE_CHECKING:
    from tuili.engine.text import TextEngine
    from tuili.server.chat import Chat
    from tuili.server.completions import Completions
    from tuili.server.protocol import ChatRequest, CompletionRequest


@dataclass(frozen=True)
class Call:
    """One request: its id (of the body, the x-request-id header, or new), served model, and time of arrival.

    ``created`` is in seconds since 1970, ``arrival`` on the engine's clock.
    """

    id: str
    model: str
    created: int
    arrival: float


@dataclass(frozen=True)
class Service:
    engine: TextEngine
    config: Config
    metrics: Metrics
    flight: InFlight = field(default_factory=InFlight)
    #: Large bodies are parsed one at a time.
    parsing: asyncio.Lock = field(default_factory=asyncio.Lock)
    #: Seconds since 1970: when the model came up.
    created: int = field(default_factory=lambda: int(time.time()))

    def model(self, name: str | None) -> str:
        """The served name. NotFoundError for any other; None means the one that is served."""
        served = self.engine.model_name
        if name is not None and name != served:
            raise NotFoundError(f"The model {name[:200]!r} does not exist; this server has {served!r}.", "model")
        return served

    def call(self, exchange: Exchange, body: ChatRequest | CompletionRequest) -> Call:
        """NotFoundError for a model that is not served."""
        id = body.request_id or exchange.id
        return Call(id, self.model(body.model), int(time.time()), self.engine.clock.now())

    async def answer(self, exchange: Exchange, work: Chat | Completions, stream: bool | None) -> Response | None:
        """JSON when ``work`` is done, or events as it comes; both end when the client leaves or the server stops."""
        if stream:
            await exchange.stream(work.events(), self.flight)
            return None
        return as_json(await self.flight.run(work.answer(), exchange.receive))


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
