"""First come, first served: nobody is admitted before someone who came earlier; the latest yields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tuili.core.policies import policies
from tuili.core.request import Request


@policies.register("fcfs")
class Fcfs:
    rectangular = False

    def key(self, request: Request) -> Any:
        return 0  # all equal, so arrival decides

    def victim(self, running: Sequence[Request]) -> Request:
        return running[-1]

    def joins(self, running: Sequence[Request]) -> bool:
        return True
