"""Who goes first and who yields: one file per policy, found by scanning this folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tuili.base.registry import Registry
from tuili.core.request import Request


class Policy(Protocol):
    """Ranks requests, picks the one that yields when the pool is full, and says whether new requests may join."""

    #: True when a batch runs as a rectangle whose rows stay until its last request is done (static batching):
    #: the scheduler then counts what padding would compute.
    rectangular: bool

    def key(self, request: Request) -> Any:
        """The rank: the smallest is admitted first and yields last; equal keys go by arrival.

        Asked once, when the request is accepted, and kept through preemption: so the queue is a heap and a step never
        sorts it. Ageing fits in because only differences count: "a class is worth 60 seconds" is arrival + 60 * class.
        """
        ...

    def victim(self, running: Sequence[Request]) -> Request:
        """Which of these to preempt: they run and rank below the one that needs blocks; best first, not empty."""
        ...

    def joins(self, running: Sequence[Request]) -> bool:
        """May waiting requests be admitted while these run? Continuous batching: always. Asked once per step."""
        ...


policies: Registry[type[Policy]] = Registry("scheduling policy", "tuili.core.policies")
