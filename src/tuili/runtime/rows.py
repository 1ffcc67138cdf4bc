"""What the data plane remembers of each request between steps: its block table and what its sampling needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tuili.core.params import SamplingParams
from tuili.core.plan import Chunk


@dataclass(slots=True)
class Row:
    """One request. ``tokens`` are its ids so far, kept only where it ``remembers`` (penalties, bad words)."""

    index: int
    params: SamplingParams
    prompt_len: int
    remembers: bool
    tokens: list[int]
    num_blocks: int = 0
    #: The id sampled last, for a chunk whose last id was still unknown to the scheduler (depth 2, law 4).
    last: int | None = None
    #: Whether a step that was submitted to a device samples, or sampled, for this row.
    sampled: bool = False
    #: [vocab] occurrences in the output, and presence in prompt or output; made on first use by the sampler.
    output_counts: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    counted: int = 0
    #: Hidden state before the next chunk's first position: its prompt logprob needs it.
    before: torch.Tensor | None = None

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


def _remembers(p: SamplingParams) -> bool:
    penalised = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
    return penalised or bool(p.bad_words_ids)


class Rows:
    """Row slots of up to ``max_rows`` requests; ``table`` [max_rows, max_blocks] int64 holds their block ids."""

    def __init__(self, max_rows: int, max_blocks: int):
        self.table = np.zeros((max_rows, max_blocks), np.int64)
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
        """The chunk's row, created if this is an admission, with its new blocks and tokens."""
        if chunk.admitted:
            self.drop(chunk.id)
            row = Row(self._free.pop(), chunk.params, chunk.prompt_len, _remembers(chunk.params), list(chunk.history))
            self._rows[chunk.id] = row
        else:
            row = self._rows[chunk.id]
        if chunk.new_blocks:
            end = row.num_blocks + len(chunk.new_blocks)
            self.table[row.index, row.num_blocks : end] = chunk.new_blocks
            row.num_blocks = end
        return row
