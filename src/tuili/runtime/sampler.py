"""Logits to tokens, in the order of interfaces.md 5.1. Every row's result depends on that row only (law 5).

Raw logits -> logprobs -> allowed ids -> bad words -> min_tokens -> logit_bias -> repetition, frequency, presence
penalty -> argmax if greedy, else temperature -> min_p -> top_k -> top_p -> draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tuili.core.params import SamplingParams
from tuili.core.plan import TopLogprobs
from tuili.runtime.penalties import adjust
from tuili.runtime.random import uniform
from tuili.runtime.rows import Row

#: Candidates looked at first when top_p cuts the tail; rows whose mass is not in them are sorted whole.
TOP_P_CANDIDATES = 128


@dataclass(frozen=True, slots=True)
class Sampled:
    """``tokens[i]`` for row i (None where its logits were not finite) and its logprobs where asked for."""

    tokens: list[int | None]
    logprobs: list[TopLogprobs | None]


def sample(logits: torch.Tensor, rows: Sequence[Row], positions: Sequence[int]) -> Sampled:
    """One token per row of ``logits`` [rows, vocab] (any float type).

    ``positions[i]`` is the absolute position that the token will take: with the row's seed it decides the draw.
    """
    scores = logits.float()
    raw = scores
    adjusted = [i for i, row in enumerate(rows) if needs_adjusting(row, positions[i])]
    if adjusted:
        scores = scores.clone()
        for i in adjusted:
            adjust(scores[i], rows[i], positions[i])
    finite = torch.isfinite(scores.amax(-1)).tolist()
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy and finite[i]]
    chosen = scores.argmax(-1)
    if drawn:
        params = [rows[i].params for i in drawn]
        picked = scores if len(drawn) == len(rows) else scores[drawn]
        chosen[drawn] = draw(picked, params, [positions[i] for i in drawn])
    tokens = chosen.tolist()
    asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None and finite[i]]
    logprobs: list[TopLogprobs | None] = [None] * len(rows)
    if asked:
        wanted = [rows[i].params.logprobs or 0 for i in asked]
        for i, entry in zip(asked, top_logprobs(raw[asked], [tokens[i] for i in asked], wanted), strict=True):
            logprobs[i] = entry
    return Sampled([t if ok else None for t, ok in zip(tokens, finite, strict=True)], logprobs)


def needs_adjusting(row: Row, position: int) -> bool:
    p = row.params
    return (
        row.remembers
        or p.allowed_token_ids is not None
        or bool(p.logit_bias)
        or position - row.prompt_len < p.min_tokens
    )


def draw(scores: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> torch.Tensor:
    """Draw from softmax(scores / temperature) [rows, vocab] after min_p, top_k and top_p: token ids [rows].

    Inverse transform with one uniform per row; the cumulative sum is sequential and in float64.
    """
    temperature = torch.tensor([p.temperature for p in params]).unsqueeze(1)
    scores = scores / temperature
    scores = cut_min_p(scores, torch.tensor([p.min_p for p in params]))
    scores = cut_top_k(scores, torch.tensor([p.top_k for p in params]))
    scores = cut_top_p(scores, torch.tensor([p.top_p for p in params]))
    cumulative = torch.softmax(scores, -1).double().cumsum(-1)
    seeds = np.array([p.seed or 0 for p in params], np.int64)
    u = torch.from_numpy(uniform(seeds, np.array(positions, np.int64))).unsqueeze(1)
    # "right": the first id whose cumulative mass exceeds u, so that ids of zero mass are never chosen.
    return torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True).squeeze(1)


def cut_min_p(scores: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Mask ids less likely than ``min_p`` times the most likely one (arXiv:2407.01082)."""
    if not bool((min_p > 0).any()):
        return scores
    floor = scores.amax(-1) + torch.log(min_p)
    return scores.masked_fill(scores < floor.unsqueeze(1), -torch.inf)


def cut_top_k(scores: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """Mask ids below the k-th highest score; equal scores stay together. 0 keeps all."""
    vocab = scores.shape[-1]
    rows = ((top_k > 0) & (top_k < vocab)).nonzero().squeeze(1)
    if not len(rows):
        return scores
    ks = top_k[rows]
    best = scores[rows].topk(int(ks.max()), -1).values
    floor = torch.full((len(scores), 1), -torch.inf)
    floor[rows] = best.gather(1, ks.unsqueeze(1) - 1)
    return scores.masked_fill(scores < floor, -torch.inf)


def cut_top_p(scores: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Mask ids outside the smallest set of most likely ids whose mass reaches ``top_p`` (arXiv:1904.09751).

    The cut is a score, so ids as likely as the last one inside stay too, and sorting only the best candidates gives the
    same set as sorting all.
    """
    rows = (top_p < 1).nonzero().squeeze(1)
    if not len(rows):
        return scores
    probs, wanted = torch.softmax(scores[rows], -1), top_p[rows].double().unsqueeze(1)
    best, ids = probs.topk(min(TOP_P_CANDIDATES, probs.shape[-1]), -1)
    floor = torch.full((len(scores), 1), -torch.inf)
    last, enough = _last_inside(best, ids, wanted)
    floor[rows] = scores[rows].gather(1, last)
    if not bool(enough.all()):
        rest = ~enough
        last, _ = _last_inside(*probs[rest].sort(-1, descending=True), wanted[rest])
        floor[rows[rest]] = scores[rows[rest]].gather(1, last)
    return scores.masked_fill(scores < floor, -torch.inf)


def _last_inside(probs: torch.Tensor, ids: torch.Tensor, mass: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of falling ``probs`` [rows, k]: the last id needed to reach ``mass`` [rows, 1], and whether k were enough."""
    cumulative = probs.double().cumsum(-1)
    needed = (cumulative < mass).sum(-1, keepdim=True).clamp_(max=probs.shape[-1] - 1)
    return ids.gather(1, needed), cumulative[:, -1] >= mass.squeeze(1)


def top_logprobs(logits: torch.Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TopLogprobs]:
    """Log-softmax of ``logits`` [rows, vocab] at ``tokens``, and its ``counts[i]`` highest entries (-1: all)."""
    vocab = logits.shape[-1]
    wanted = [vocab if c < 0 else min(c, vocab) for c in counts]
    logprobs = torch.log_softmax(logits.float(), -1)
    chosen = logprobs.gather(1, torch.tensor(tokens).unsqueeze(1))
    ranks = ((logprobs > chosen).sum(-1) + 1).tolist()
    values, ids = logprobs.topk(max(wanted), -1)
    out = []
    for row, (token, k) in enumerate(zip(tokens, wanted, strict=True)):
        top = tuple(zip(ids[row, :k].tolist(), values[row, :k].tolist(), strict=True))
        out.append(TopLogprobs(token, float(chosen[row]), int(ranks[row]), top))
    return out
