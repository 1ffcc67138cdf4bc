"""Lower ``priority`` values first, ties by arrival; the lowest class yields first.

Without ageing the order is strict, and a steady load of a higher class starves a lower one for as long as it lasts.
With ``aging_seconds`` a class is worth that many seconds of waiting: a request of class p is overtaken by one of class
q < p only if that one arrives less than (p - q) * aging_seconds later, so what can pass it is finite.
"""

from __future__ import annotations

from typing import Any

from tuili.base.errors import ConfigError
from tuili.core.policies import policies
from tuili.core.policies.fcfs import Fcfs
from tuili.core.request import Request


@policies.register("priority")
class Priority(Fcfs):
    def __init__(self, aging_seconds: float | None = None):
        if aging_seconds is not None and not aging_seconds > 0:
            raise ConfigError(f"aging_seconds must be above 0, or None for strict classes, got {aging_seconds}")
        self.aging_seconds = aging_seconds

    def key(self, request: Request) -> Any:
        if self.aging_seconds is None:
            return request.priority
        return request.timing.queued + self.aging_seconds * request.priority
