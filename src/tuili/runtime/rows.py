"""What the data plane remembers of each request between steps: its place in the block table, its sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tuili.core.params import SamplingParams
from tuili.core.plan import Chunk
from tuili.runtime.rules import Rule, rules_of


@dataclass(slots=True)
class Row:
    """One request. ``tokens`` are its ids so far, kept only where one of its ``rules`` reads them (``remembers``)."""

    index: int
    params: SamplingParams
    prompt_len: int
    tokens: list[int]
    rules: tuple[Rule, ...] = field(init=False)
    remembers: bool = field(init=False)
    num_blocks: int = 0
    #: The id that was read last, and how many were sampled after it by steps in flight.
    last: int | None = None
    unread: int = 0
    #: What rules remember of the request, by rule.
    notes: dict[type[Rule], Any] = field(default_factory=dict)
    #: Hidden state before the next chunk's first position: its prompt logprob needs it.
    before: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.rules = rules_of(self.params)
        self.remembers = any(rule.reads_tokens for rule in self.rules)

    def ids(self, chunk: Chunk) -> Sequence[int]:
        """The ids of the chunk's positions; the one that the scheduler could not know yet is the last sample."""
        tokens: Sequence[int] = chunk.tokens
        missing = chunk.count - len(tokens)
        if missing:
            if missing != 1 or self.last is None:
                raise lacking(chunk)
            tokens = (*tokens, self.last)
        if self.remembers:
            self.tokens[chunk.start :] = tokens
        return tokens


def lacking(chunk: Chunk) -> RuntimeError:
    """For a chunk without ids that nobody can fill in (law 4)."""
    missing = chunk.count - len(chunk.tokens)
    return RuntimeError(f"chunk of request {chunk.id} lacks {missing} token ids that were never sampled")


def decodes(chunk: Chunk) -> bool:
    """One position, whose logits alone are needed."""
    return (
        chunk.count == 1 and chunk.sample and (chunk.params.prompt_logprobs is None or chunk.start >= chunk.prompt_len)
    )


class Rows:
    """Row slots of up to ``max_rows`` requests."""

    def __init__(self, max_rows: int):
        self._rows: dict[str, Row] = {}
        self._free = list(range(max_rows - 1, -1, -1))

    def __getitem__(self, id: str) -> Row:
        return self._rows[id]

    def __len__(self) -> int:
        return len(self._rows)

    def drop(self, id: str) -> None:
        row = self._rows.pop(id, None)
        if row is not None:
            self._free.append(row.index)

    def advance(self, chunk: Chunk) -> Row:
        """The chunk's row, created if this is an admission, with its new blocks counted."""
        if chunk.admitted:
            self.drop(chunk.id)
            row = self._rows[chunk.id] = Row(self._free.pop(), chunk.params, chunk.prompt_len, list(chunk.history))
        else:
            row = self._rows[chunk.id]
        row.num_blocks += len(chunk.new_blocks)
        return row
