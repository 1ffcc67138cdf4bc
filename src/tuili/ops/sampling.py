"""From logits to tokens: the best id, a draw, log-probabilities; in torch. A row's result is its own (law 5)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tuili.ops.samples import each_dtype, randn
from tuili.ops.table import Sample, op

#: Candidates looked at first when top_p cuts the tail; rows whose mass is not in them are sorted whole.
TOP_P_CANDIDATES = 128


def _rows(g: torch.Generator, d: torch.dtype, rows: int, vocab: int) -> torch.Tensor:
    return (randn(g, rows, vocab) * 3).to(d)


def _one(g: torch.Generator, d: torch.dtype, rows: int, vocab: int) -> tuple[torch.Tensor]:
    return (_rows(g, d, rows, vocab),)


def _argmax_samples() -> list[Sample]:
    sizes = ((1, 1), (3, 50), (5, 511), (33, 4096), (2, 20_001))
    return [
        sample
        for rows, vocab in sizes
        for sample in each_dtype(f"{rows}x{vocab}", partial(_one, rows=rows, vocab=vocab))
    ]


@op(_argmax_samples)
def argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The id of the highest of each row of ``logits`` [rows, vocab], the first of equals, and whether it is finite.

    Both [rows], int64 and bool. The id is 0 where the highest is infinite or anything is not a number.
    """
    finite = torch.isfinite(logits.amax(-1))
    return torch.where(finite, logits.argmax(-1), 0), finite


def _draw_arguments(
    g: torch.Generator,
    d: torch.dtype,
    rows: int,
    vocab: int,
    temperature: float = 1.0,
    min_p: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[torch.Tensor, ...]:
    """Every fourth row is greedy, every third cuts nothing."""
    third = torch.arange(rows) % 3 == 0
    return (
        _rows(g, d, rows, vocab),
        torch.where(torch.arange(rows) % 4 == 3, 0.0, temperature),
        torch.where(third, 0.0, min_p),
        torch.where(third, 0, top_k),
        torch.where(third, 1.0, top_p),
        torch.rand(rows, generator=g, dtype=torch.float64),
    )


def _draw_samples() -> list[Sample]:
    wishes: dict[str, dict[str, Any]] = {
        "plain": {},
        "cold": {"temperature": 0.3},
        "hot": {"temperature": 1.9},
        "min_p": {"min_p": 0.05},
        "top_k": {"top_k": 20},
        "top_p": {"top_p": 0.9},
        "all": {"temperature": 0.8, "min_p": 0.01, "top_k": 40, "top_p": 0.95},
    }
    return [
        sample
        for name, wish in wishes.items()
        for rows, vocab in ((1, 50), (9, 513), (33, 4096))
        for sample in each_dtype(f"{name}-{rows}x{vocab}", partial(_draw_arguments, rows=rows, vocab=vocab, **wish))
    ]


@op(_draw_samples)
def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    min_p: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    uniform: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A draw from softmax(logits / temperature) of each row [rows, vocab] after min_p, top_k and top_p; else as argmax.

    One value per row [rows]: ``temperature``, ``min_p``, ``top_p`` float32, ``top_k`` int64, ``uniform`` float64 in
    [0, 1). Temperature 0 is argmax; min_p 0, top_k 0 and top_p 1 keep everything. The draw is by inverse transform:
    the first id whose cumulative probability (float64, by rising id) exceeds ``uniform``. Where that falls within
    rounding of the border between two ids, implementations may differ.
    """
    best, finite = argmax.reference(logits)
    drawn = (finite & (temperature > 0)).nonzero().squeeze(1)
    if not len(drawn):
        return best, finite
    x = logits[drawn].float()
    scores = (x - x.amax(-1, keepdim=True)) * (1 / temperature[drawn]).unsqueeze(1)  # the best first: no overflow
    scores = cut_min_p(scores, min_p[drawn])
    scores = cut_top_k(scores, top_k[drawn])
    scores = cut_top_p(scores, top_p[drawn])
    cumulative = torch.softmax(scores, -1).double().cumsum(-1)
    # "right": the first id whose cumulative mass exceeds it, so that ids of zero mass are never chosen.
    target = uniform[drawn].unsqueeze(1) * cumulative[:, -1:]
    best[drawn] = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return best, finite


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
    floor = scores.new_full((len(scores), 1), -torch.inf)
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
    floor = scores.new_full((len(scores), 1), -torch.inf)
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


def _logprobs_samples() -> list[Sample]:
    def arguments(g: torch.Generator, d: torch.dtype, rows: int, vocab: int, count: int) -> tuple[Any, ...]:
        return _rows(g, d, rows, vocab), torch.randint(0, vocab, (rows,), generator=g), count

    return [
        sample
        for rows, vocab, count in ((1, 1, 1), (3, 50, 1), (5, 511, 511), (33, 4096, 20), (2, 20_001, 5))
        for sample in each_dtype(f"{rows}x{vocab}-top{count}", partial(arguments, rows=rows, vocab=vocab, count=count))
    ]


@op(_logprobs_samples, tolerance=1e-6)
def logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-softmax of ``logits`` [rows, vocab] at ``tokens`` [rows] and at the ``count`` highest ids.

    (values [rows] float32, ranks [rows] int64: 1 + how many ids are higher, top values [rows, count], top ids
    [rows, count]: best first, of equals the first id first). All values are nan for a row whose highest is not finite.
    """
    x = logits.float()
    values = torch.log_softmax(x, -1)
    token = tokens.unsqueeze(1)
    ranks = (x > x.gather(1, token)).sum(-1) + 1
    ids = torch.empty(len(x), count, dtype=torch.long, device=x.device)
    if count:
        floors = x.topk(count, -1).values[:, -1]
        for row, (scores, floor) in enumerate(zip(x, floors, strict=True)):
            near = (~(scores < floor)).nonzero().squeeze(1)
            ids[row] = near[scores[near].sort(descending=True, stable=True).indices[:count]]
    return values.gather(1, token).squeeze(1), ranks, values.gather(1, ids), ids
