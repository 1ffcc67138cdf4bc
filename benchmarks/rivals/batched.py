"""What llama.cpp and its fork have in common: a context that decodes batches of (token, position, sequence), and how
prompts and new tokens become such batches. Keys and values of the last prompts are kept."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from rivals.rival import Timed
from rivals.scenarios import MAX_LENGTH, MAX_POSITIONS, MAX_REQUESTS

#: Token, position, sequence, and whether its scores are wanted.
Entry = tuple[int, int, int, bool]


class Context(ABC):
    """Room for so many positions and sequences. ``size`` is the most entries of one call of ``decode``."""

    size: int

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []

    @abstractmethod
    def clear(self) -> None:
        """Forget the keys and values of all sequences."""

    @abstractmethod
    def cut(self, sequence: int, start: int) -> None:
        """Forget those of a sequence from position ``start`` on."""

    @abstractmethod
    def decode(self, entries: Sequence[Entry]) -> list[int]:
        """The greedy token after each of the entries whose scores are wanted."""

    def generate(self, prompts: list[list[int]], new: int) -> list[list[Timed]]:
        began = time.perf_counter()
        rows: list[list[Timed]] = [[] for _ in prompts]
        tokens = self._prefill(prompts)
        for index in range(new):
            now = time.perf_counter() - began
            for row, token in zip(rows, tokens, strict=True):
                row.append((token, now))
            if index < new - 1:
                tokens = self._run([(tok, len(prompts[row]) + index, row, True) for row, tok in enumerate(tokens)])
        return rows

    def _prefill(self, prompts: list[list[int]]) -> list[int]:
        """The first token of each; prompts equal to the last ones are computed again for their last token only."""
        kept = prompts == self.prompts
        if not kept:
            self.clear()
        self.prompts = prompts
        entries = []
        for row, prompt in enumerate(prompts):
            last = len(prompt) - 1
            start = last if kept else 0
            self.cut(row, start)
            entries += [(prompt[position], position, row, position == last) for position in range(start, len(prompt))]
        return self._run(entries)

    def _run(self, entries: Sequence[Entry]) -> list[int]:
        """Decode any number of entries, a logical batch at a time."""
        return [
            token
            for begin in range(0, len(entries), self.size)
            for token in self.decode(entries[begin : begin + self.size])
        ]


class Batched:
    """A session of two contexts, made when they are needed by ``make(positions, sequences)``: positions may be split
    evenly among the sequences of a context, so one is for a long prompt, the other for many requests."""

    def __init__(self, make: Callable[[int, int], Context]):
        self.make = make
        self.contexts: dict[bool, Context] = {}

    def generate(self, prompts: Sequence[list[int]], new: int) -> list[list[Timed]]:
        alone = len(prompts) == 1
        if alone not in self.contexts:
            self.contexts[alone] = self.make(*((MAX_LENGTH, 1) if alone else (MAX_POSITIONS, MAX_REQUESTS)))
        return self.contexts[alone].generate(list(prompts), new)


def greedy(scores: Any, vocab: int) -> int:
    """The place of the largest of ``vocab`` floats at a pointer of ctypes."""
    import numpy

    return int(numpy.ctypeslib.as_array(scores, (vocab,)).argmax())
