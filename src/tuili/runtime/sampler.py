"""Logits to tokens, in the order of interfaces.md 5.1. Every row's result depends on that row only (law 5).

Raw logits -> logprobs -> allowed ids -> bad words -> min_tokens -> logit_bias -> repetition, frequency, presence
penalty -> argmax if greedy, else temperature -> min_p -> top_k -> top_p -> draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tuili import ops
from tuili.core.params import SamplingParams
from tuili.core.plan import TopLogprobs
from tuili.runtime.penalties import adjust, needs_adjusting
from tuili.runtime.random import uniform
from tuili.runtime.rows import Row


@dataclass(frozen=True, slots=True)
class Sampled:
    """``tokens[i]`` for row i (None where its logits were not finite) and its logprobs where asked for."""

    tokens: list[int | None]
    logprobs: list[TopLogprobs | None]


def sample(logits: torch.Tensor, rows: Sequence[Row], positions: Sequence[int]) -> Sampled:
    """One token per row of ``logits`` [rows, vocab] (any float type).

    ``positions[i]`` is the absolute position that the token will take: with the row's seed it decides the draw.
    """
    ids, finite = choose(logits, [row.params for row in rows], positions)
    changed = [i for i, row in enumerate(rows) if needs_adjusting(row, positions[i])]
    if changed:
        scores = logits[changed].float()
        for own_scores, i in zip(scores, changed, strict=True):
            adjust(own_scores, rows[i], positions[i])
        own = choose(scores, [rows[i].params for i in changed], [positions[i] for i in changed])
        ids[changed], finite[changed] = own
    tokens = [id if ok else None for id, ok in zip(ids.tolist(), finite.tolist(), strict=True)]
    logprobs: list[TopLogprobs | None] = [None] * len(rows)
    asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None and tokens[i] is not None]
    if asked:
        raw = logits if len(asked) == len(rows) else logits[asked]
        entries = top_logprobs(raw, ids[asked], [rows[i].params.logprobs or 0 for i in asked])
        for i, entry in zip(asked, entries, strict=True):
            logprobs[i] = entry
    return Sampled(tokens, logprobs)


def choose(
    logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [rows] and whether they mean anything [rows]: the best ones, or draws with one uniform per row."""
    if all(p.greedy for p in params):
        return ops.argmax(logits)
    wishes = np.array([(0.0 if p.greedy else p.temperature, p.min_p, p.top_p) for p in params], np.float32).T.copy()
    temperature, min_p, top_p = torch.from_numpy(wishes)
    top_k = torch.tensor([p.top_k for p in params])
    seeds = np.array([p.seed or 0 for p in params], np.int64)
    u = torch.from_numpy(uniform(seeds, np.array(positions, np.int64)))
    return ops.draw(logits, temperature, min_p, top_k, top_p, u)


def top_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor | Sequence[int], counts: Sequence[int]
) -> list[TopLogprobs]:
    """Log-softmax of ``logits`` [rows, vocab] at ``tokens``, and its ``counts[i]`` highest entries (-1: all)."""
    vocab = logits.shape[-1]
    wanted = [vocab if c < 0 else min(c, vocab) for c in counts]
    made = ops.logprobs(logits, torch.as_tensor(tokens), max(wanted))
    columns = (torch.as_tensor(tokens).tolist(), *(t.tolist() for t in made), wanted)
    return [
        TopLogprobs(token, value, rank, tuple(zip(ids[:k], values[:k], strict=True)))
        for token, value, rank, values, ids, k in zip(*columns, strict=True)
    ]
