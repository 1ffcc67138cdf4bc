"""The waiting requests, best rank first: a heap with lazy deletion, O(log n) per operation."""

from __future__ import annotations

import heapq
from typing import Any, Generic, Protocol, TypeVar


class Ranked(Protocol):
    #: Unique and constant: (the policy's key, arrival number).
    rank: tuple[Any, int]


T = TypeVar("T", bound=Ranked)


class WaitingQueue(Generic[T]):
    """Items are told apart by rank."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[Any, int], T]] = []
        self._alive: set[int] = set()

    def __len__(self) -> int:
        return len(self._alive)

    def push(self, item: T) -> None:
        self._alive.add(item.rank[1])
        heapq.heappush(self._heap, (item.rank, item))

    def peek(self) -> T | None:
        while self._heap and self._heap[0][0][1] not in self._alive:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> T:
        """Remove and return what ``peek`` returns; IndexError when empty."""
        item = self.peek()
        if item is None:
            raise IndexError("pop from an empty queue")
        heapq.heappop(self._heap)
        self._alive.remove(item.rank[1])
        return item

    def discard(self, item: T) -> None:
        """Take ``item`` out for good, wherever it is; its heap entry goes later, at the top or when half are dead."""
        self._alive.discard(item.rank[1])
        if len(self._heap) > 2 * len(self._alive) + 16:
            self._heap = [entry for entry in self._heap if entry[0][1] in self._alive]
            heapq.heapify(self._heap)
