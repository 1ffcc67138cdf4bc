"""Logits to tokens, in the order of interfaces.md 5.1. Every row's result depends on that row only (law 5).

Raw logits -> logprobs -> rules (``runtime.rules``) -> argmax if greedy, else temperature -> min_p -> top_k -> top_p ->
draw. Random numbers are a function of (seed, position): the same tokens whatever the batch or the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from tuili.core.params import SamplingParams
from tuili.core.plan import TopLogprobs
from tuili.ops import REFERENCE, Kernels
from tuili.runtime.device import send
from tuili.runtime.rows import Row

#: Log-probabilities of some tokens, one per row of logits, and of the highest: tokens, values, ranks [rows], top
#: values, top ids [rows, width].
Top = tuple[torch.Tensor, ...]
#: The largest ``top_k`` that means anything else than the whole vocabulary.
MOST = 2**31 - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))


@dataclass(frozen=True, slots=True)
class Chosen:
    """Tensors of the logits' device: ``ids`` [rows], ``finite`` [rows] whether they mean anything, and ``top`` of the
    rows whose requests ask for logprobs, in order (empty: none). ``broken``: rows whose own rules failed, and why."""

    ids: torch.Tensor
    finite: torch.Tensor
    top: Top = ()
    broken: dict[int, str] = field(default_factory=dict)


class Sampled(NamedTuple):
    """``tokens[i]`` for row i (None where its logits were not finite) and its logprobs where asked for."""

    tokens: list[int | None]
    logprobs: list[TopLogprobs | None]


def settings(params: Sequence[SamplingParams], positions: Sequence[int]) -> tuple[np.ndarray, ...]:
    """What ``ops.draw`` takes beside the logits, a value per row; nothing where all are greedy.

    ``positions[i]`` is the absolute position that the token will take: with the row's seed it decides the draw.
    """
    if all(p.greedy for p in params):
        return ()
    wishes = np.array([(0.0 if p.greedy else p.temperature, p.min_p, p.top_p) for p in params], np.float32).T.copy()
    seeds = np.array([p.seed or 0 for p in params], np.int64)
    u = uniform(seeds, np.array(positions, np.int64))
    return wishes[0], wishes[1], np.array([min(p.top_k, MOST) for p in params], np.int64), wishes[2], u


def uniform(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One float64 in [0, 1) per pair of ``seeds`` and ``positions`` [n] (any 64-bit integers)."""
    state = _mix(seeds.astype(np.int64).view(np.uint64) + _GOLDEN)  # arrays wrap around without a word
    state = _mix(state + (positions.astype(np.int64).view(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (state >> np.uint64(11)) * (1.0 / 2**53)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195)."""
    for shift, factor in _MIX:
        x = (x ^ (x >> shift)) * factor
    return x ^ (x >> np.uint64(31))


def choose_tokens(
    logits: torch.Tensor,
    rows: Sequence[Row],
    positions: Sequence[int],
    wishes: Sequence[torch.Tensor],
    kernels: Kernels = REFERENCE,
) -> Chosen:
    """One token per row of ``logits`` [rows, vocab] (any float type). The device's part: reads nothing back.

    ``positions[i]`` is where row i's token will stand; ``wishes``: the ``settings``, where the logits are.
    """
    ids, finite = _draw(logits, wishes, kernels)
    broken: dict[int, str] = {}
    if ruled := [i for i, row in enumerate(rows) if row.rules and _is_ruled(i, row, positions[i], broken)]:
        at = send(ruled, logits.device)
        scores = logits[at].float()
        for own_scores, i in zip(scores, ruled, strict=True):
            _apply_rules(own_scores, i, rows[i], positions[i], broken)
        ids[at], finite[at] = _draw(scores, [wish[at] for wish in wishes], kernels)
    asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    if not asked:
        return Chosen(ids, finite, (), broken)
    width = max(_width(rows[i].params.logprobs or 0, logits) for i in asked)
    if len(asked) == len(rows):
        return Chosen(ids, finite, rank(logits, ids, width, kernels), broken)
    at = send(asked, logits.device)
    return Chosen(ids, finite, rank(logits[at], ids[at], width, kernels), broken)


def _is_ruled(i: int, row: Row, position: int, broken: dict[int, str]) -> bool:
    """Whether a rule changes the scores of ``row``. One that fails ends its request only (law 6)."""
    try:
        return any(rule.applies(row, position) for rule in row.rules)
    except Exception as error:
        broken[i] = f"{type(error).__name__} in a rule for its logits: {error}"
        return False


def _apply_rules(scores: torch.Tensor, i: int, row: Row, position: int, broken: dict[int, str]) -> None:
    """Change one row's ``scores`` [vocab] in place. A rule that fails ends its request only (law 6)."""
    try:
        for rule in row.rules:
            if rule.applies(row, position):
                rule.apply(scores, row, position)
    except Exception as error:
        broken[i] = f"{type(error).__name__} in a rule for its logits: {error}"


def read_tokens(chosen: Chosen, rows: Sequence[Row]) -> Sampled:
    """The host's part: tensors of the CPU as numbers."""
    tokens = [id if ok else None for id, ok in zip(chosen.ids.tolist(), chosen.finite.tolist(), strict=True)]
    logprobs: list[TopLogprobs | None] = [None] * len(rows)
    if chosen.top:
        asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        entries = read_logprobs(chosen.top, [rows[i].params.logprobs or 0 for i in asked])
        for i, entry in zip(asked, entries, strict=True):
            logprobs[i] = entry if tokens[i] is not None else None
    return Sampled(tokens, logprobs)


def _draw(logits: torch.Tensor, wishes: Sequence[torch.Tensor], kernels: Kernels) -> tuple[torch.Tensor, torch.Tensor]:
    return kernels.draw(logits, *wishes) if wishes else kernels.argmax(logits)


def _width(count: int, logits: torch.Tensor) -> int:
    vocab = logits.shape[-1]
    return vocab if count < 0 else min(count, vocab)


def rank(logits: torch.Tensor, tokens: torch.Tensor, width: int, kernels: Kernels = REFERENCE) -> Top:
    """Log-softmax of ``logits`` [rows, vocab] at ``tokens`` [rows], and its ``width`` highest entries (-1: all)."""
    return tokens, *kernels.logprobs(logits, tokens, _width(width, logits))


def read_logprobs(top: Top, counts: Sequence[int]) -> list[TopLogprobs]:
    """``top``, on the CPU, as numbers, of row i the ``counts[i]`` highest (-1: all)."""
    ends = [None if count < 0 else count for count in counts]
    return [
        TopLogprobs(token, value, rank, tuple(zip(ids[:end], values[:end], strict=True)))
        for token, value, rank, values, ids, end in zip(*(part.tolist() for part in top), ends, strict=True)
    ]
