"""Logits to tokens, in the order of interfaces.md 5.1. Every row's result depends on that row only (law 5).

Raw logits -> logprobs -> allowed ids -> bad words -> min_tokens -> logit_bias -> repetition, frequency, presence
penalty -> argmax if greedy, else temperature -> min_p -> top_k -> top_p -> draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from tuili import ops
from tuili.core.params import SamplingParams
from tuili.core.plan import TopLogprobs
from tuili.runtime.device import send
from tuili.runtime.penalties import adjust, needs_adjusting
from tuili.runtime.random import uniform
from tuili.runtime.rows import Row

#: Log-probabilities of some tokens, one per row of logits, and of the highest: tokens, values, ranks [rows], top
#: values, top ids [rows, width].
Top = tuple[torch.Tensor, ...]


class Chosen(NamedTuple):
    """Tensors of the logits' device: ``ids`` [rows], ``finite`` [rows] whether they mean anything, and ``top`` of the
    rows whose requests ask for logprobs, in order (empty: none)."""

    ids: torch.Tensor
    finite: torch.Tensor
    top: Top = ()


@dataclass(frozen=True, slots=True)
class Sampled:
    """``tokens[i]`` for row i (None where its logits were not finite) and its logprobs where asked for."""

    tokens: list[int | None]
    logprobs: list[TopLogprobs | None]


def sample(logits: torch.Tensor, rows: Sequence[Row], positions: Sequence[int]) -> Sampled:
    """One token per row of ``logits`` [rows, vocab] (any float type), on the CPU.

    ``positions[i]`` is the absolute position that the token will take: with the row's seed it decides the draw.
    """
    wishes = settings([row.params for row in rows], positions)
    return tell(decide(logits, rows, positions, [torch.from_numpy(wish) for wish in wishes]), rows)


def settings(params: Sequence[SamplingParams], positions: Sequence[int]) -> tuple[np.ndarray, ...]:
    """What ``ops.draw`` takes beside the logits, a value per row; nothing where all are greedy."""
    if all(p.greedy for p in params):
        return ()
    wishes = np.array([(0.0 if p.greedy else p.temperature, p.min_p, p.top_p) for p in params], np.float32).T.copy()
    seeds = np.array([p.seed or 0 for p in params], np.int64)
    u = uniform(seeds, np.array(positions, np.int64))
    return wishes[0], wishes[1], np.array([p.top_k for p in params], np.int64), wishes[2], u


def decide(
    logits: torch.Tensor, rows: Sequence[Row], positions: Sequence[int], wishes: Sequence[torch.Tensor]
) -> Chosen:
    """The device's part of ``sample``: reads nothing back. ``wishes``: the ``settings``, where the logits are."""
    ids, finite = _choose(logits, wishes)
    changed = [i for i, row in enumerate(rows) if needs_adjusting(row, positions[i])]
    if changed:
        at = send(changed, logits.device)
        scores = logits[at].float()
        for own_scores, i in zip(scores, changed, strict=True):
            adjust(own_scores, rows[i], positions[i])
        ids[at], finite[at] = _choose(scores, [wish[at] for wish in wishes])
    asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    if not asked:
        return Chosen(ids, finite)
    width = max(_width(rows[i].params.logprobs or 0, logits) for i in asked)
    if len(asked) == len(rows):
        return Chosen(ids, finite, rank(logits, ids, width))
    at = send(asked, logits.device)
    return Chosen(ids, finite, rank(logits[at], ids[at], width))


def tell(chosen: Chosen, rows: Sequence[Row]) -> Sampled:
    """The host's part: tensors of the CPU as numbers."""
    tokens = [id if ok else None for id, ok in zip(chosen.ids.tolist(), chosen.finite.tolist(), strict=True)]
    logprobs: list[TopLogprobs | None] = [None] * len(rows)
    if chosen.top:
        asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        entries = told(chosen.top, [rows[i].params.logprobs or 0 for i in asked])
        for i, entry in zip(asked, entries, strict=True):
            logprobs[i] = entry if tokens[i] is not None else None
    return Sampled(tokens, logprobs)


def _choose(logits: torch.Tensor, wishes: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.draw(logits, *wishes) if wishes else ops.argmax(logits)


def _width(count: int, logits: torch.Tensor) -> int:
    vocab = logits.shape[-1]
    return vocab if count < 0 else min(count, vocab)


def rank(logits: torch.Tensor, tokens: torch.Tensor, width: int) -> Top:
    """Log-softmax of ``logits`` [rows, vocab] at ``tokens`` [rows], and its ``width`` highest entries (-1: all)."""
    return tokens, *ops.logprobs(logits, tokens, _width(width, logits))


def told(top: Top, counts: Sequence[int]) -> list[TopLogprobs]:
    """``top``, on the CPU, as numbers, of row i the ``counts[i]`` highest (-1: all)."""
    ends = [None if count < 0 else count for count in counts]
    return [
        TopLogprobs(token, value, rank, tuple(zip(ids[:end], values[:end], strict=True)))
        for token, value, rank, values, ids, end in zip(*(part.tolist() for part in top), ends, strict=True)
    ]
