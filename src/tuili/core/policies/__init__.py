"""Who goes first and who yields: one file per policy, found by scanning this folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from tuili.base.registry import Registry
from tuili.core.request import Request


class Policy(Protocol):
    """Order of admission, the running request that yields when the pool is full, and whether new requests may join."""

    def order(self, requests: Iterable[Request], now: float) -> Sequence[Request]:
        """Waiting requests, the first to admit first."""
        ...

    def victim(self, running: Sequence[Request]) -> Request:
        """The running request to preempt; ``running`` is not empty."""
        ...

    def joins(self, running: Sequence[Request]) -> bool:
        """May a waiting request be admitted while these run? Continuous batching: always; static: only when none runs."""
        ...


policies: Registry[type[Policy]] = Registry("scheduling policy", "tuili.core.policies")
