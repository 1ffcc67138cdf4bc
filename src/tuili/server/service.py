"""What every route works with, and what one call of a route is."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tuili.base.config import Config
from tuili.base.errors import NotFoundError
from tuili.server.metrics import Metrics
from tuili.server.stream import InFlight

if TYPE_CHECKING:
    from tuili.engine.text import TextEngine


@dataclass(frozen=True)
class Service:
    engine: TextEngine
    config: Config
    metrics: Metrics
    flight: InFlight = field(default_factory=InFlight)
    #: Seconds since 1970: when the model came up.
    created: int = field(default_factory=lambda: int(time.time()))

    def model(self, name: str | None) -> str:
        """The served name. NotFoundError for any other; None means the one that is served."""
        served = self.engine.model_name
        if name is not None and name != served:
            raise NotFoundError(f"The model {name[:200]!r} does not exist; this server has {served!r}.", "model")
        return served


@dataclass(frozen=True)
class Call:
    """One request: its id (of the body, the x-request-id header, or new), served model, and time of arrival.

    ``created`` is in seconds since 1970, ``arrival`` on the engine's clock.
    """

    id: str
    model: str
    created: int
    arrival: float
