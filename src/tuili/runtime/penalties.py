"""What a request's own wishes do to its logits: masks, biases and penalties, in the order of interfaces.md 5.1."""

from __future__ import annotations

import torch

from tuili.runtime.device import send
from tuili.runtime.rows import Row


def needs_adjusting(row: Row, position: int) -> bool:
    """Whether ``adjust`` changes anything for the token at ``position``."""
    p = row.params
    return (
        row.remembers
        or p.allowed_token_ids is not None
        or bool(p.logit_bias)
        or position - row.prompt_len < p.min_tokens
    )


def adjust(scores: torch.Tensor, row: Row, position: int) -> None:
    """Change one row's ``scores`` [vocab] in place. ``position`` is where the token will stand."""
    p = row.params
    if p.allowed_token_ids is not None:
        keep = torch.full_like(scores, -torch.inf)
        ids = send(p.allowed_token_ids, scores.device)
        keep[ids] = scores[ids]
        scores.copy_(keep)
    for word in p.bad_words_ids:
        if _ends_with(row.tokens, word[:-1]):
            scores[word[-1]].fill_(-torch.inf)
    if position - row.prompt_len < p.min_tokens and p.stop_ids:
        scores.index_fill_(0, send(list(p.stop_ids), scores.device), -torch.inf)
    if p.logit_bias:
        scores[send(list(p.logit_bias), scores.device)] += send(list(p.logit_bias.values()), scores.device)
    _penalise(scores, row)


def _ends_with(tokens: list[int], tail: tuple[int, ...]) -> bool:
    return not tail or (len(tokens) >= len(tail) and tuple(tokens[-len(tail) :]) == tail)


def _penalise(scores: torch.Tensor, row: Row) -> None:
    """Repetition penalty over prompt and output (arXiv:1909.05858), frequency and presence penalty over the output."""
    p = row.params
    if p.repetition_penalty == 1.0 and not p.frequency_penalty and not p.presence_penalty:
        return
    counts, seen = _count(row, scores.shape[-1], scores.device)
    if p.repetition_penalty != 1.0:
        punished = torch.where(scores > 0, scores / p.repetition_penalty, scores * p.repetition_penalty)
        scores.copy_(torch.where(seen, punished, scores))
    if p.frequency_penalty:
        scores -= p.frequency_penalty * counts
    if p.presence_penalty:
        scores -= p.presence_penalty * (counts > 0)


def _count(row: Row, vocab: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Occurrences in the output [vocab] and presence anywhere [vocab]; adds only the ids that are new."""
    if row.output_counts is None or row.seen is None:
        row.output_counts = torch.zeros(vocab, device=device)
        row.seen = torch.zeros(vocab, dtype=torch.bool, device=device)
    new = row.tokens[row.counted :]
    if new:
        row.seen.index_fill_(0, send(new, device), True)
        if output := row.tokens[max(row.counted, row.prompt_len) :]:
            row.output_counts.index_add_(0, send(output, device), torch.ones(len(output), device=device))
        row.counted = len(row.tokens)
    return row.output_counts, row.seen
