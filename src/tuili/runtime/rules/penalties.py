"""Repetition penalty over prompt and output (arXiv:1909.05858), frequency and presence penalty over the output."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tuili.core.params import SamplingParams
from tuili.runtime.device import send
from tuili.runtime.rows import Row
from tuili.runtime.rules import rules


@dataclass
class Counts:
    """Of the first ``known`` ids of a request: occurrences in the output, and presence anywhere, both [vocab]."""

    output: torch.Tensor
    seen: torch.Tensor
    known: int = 0

    def add(self, tokens: list[int], prompt_len: int) -> None:
        """Count those of ``tokens`` that are new."""
        if new := tokens[self.known :]:
            device = self.seen.device
            self.seen.index_fill_(0, send(new, device), True)
            if output := tokens[max(self.known, prompt_len) :]:
                self.output.index_add_(0, send(output, device), torch.ones(len(output), device=device))
            self.known = len(tokens)


@rules.register("penalties")
class Penalties:
    order = 50
    reads_tokens = True

    def wants(self, params: SamplingParams) -> bool:
        return params.repetition_penalty != 1.0 or bool(params.frequency_penalty or params.presence_penalty)

    def applies(self, row: Row, position: int) -> bool:
        return True

    def apply(self, scores: torch.Tensor, row: Row, position: int) -> None:
        p, counts = row.params, self._count(row, scores)
        if p.repetition_penalty != 1.0:
            punished = torch.where(scores > 0, scores / p.repetition_penalty, scores * p.repetition_penalty)
            scores.copy_(torch.where(counts.seen, punished, scores))
        if p.frequency_penalty:
            scores -= p.frequency_penalty * counts.output
        if p.presence_penalty:
            scores -= p.presence_penalty * (counts.output > 0)

    def _count(self, row: Row, scores: torch.Tensor) -> Counts:
        counts = row.notes.get(Penalties)
        if counts is None:
            none = torch.zeros(len(scores), device=scores.device)
            counts = row.notes[Penalties] = Counts(none, none.bool())
        counts.add(row.tokens, row.prompt_len)
        return counts
