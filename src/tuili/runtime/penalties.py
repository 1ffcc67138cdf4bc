"""What a request's own wishes do to its logits: masks, biases and penalties, in the order of interfaces.md 5.1."""

from __future__ import annotations

import torch

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
        ids = torch.tensor(p.allowed_token_ids)
        keep[ids] = scores[ids]
        scores.copy_(keep)
    for word in p.bad_words_ids:
        if _ends_with(row.tokens, word[:-1]):
            scores[word[-1]] = -torch.inf
    if position - row.prompt_len < p.min_tokens and p.stop_ids:
        scores[list(p.stop_ids)] = -torch.inf
    if p.logit_bias:
        scores[list(p.logit_bias)] += torch.tensor(list(p.logit_bias.values()))
    _penalise(scores, row)


def _ends_with(tokens: list[int], tail: tuple[int, ...]) -> bool:
    return not tail or (len(tokens) >= len(tail) and tuple(tokens[-len(tail) :]) == tail)


def _penalise(scores: torch.Tensor, row: Row) -> None:
    """Repetition penalty over prompt and output (arXiv:1909.05858), frequency and presence penalty over the output."""
    p = row.params
    if p.repetition_penalty == 1.0 and not p.frequency_penalty and not p.presence_penalty:
        return
    counts, seen = _count(row, scores.shape[-1])
    if p.repetition_penalty != 1.0:
        punished = torch.where(scores > 0, scores / p.repetition_penalty, scores * p.repetition_penalty)
        scores.copy_(torch.where(seen, punished, scores))
    if p.frequency_penalty:
        scores -= p.frequency_penalty * counts
    if p.presence_penalty:
        scores -= p.presence_penalty * (counts > 0)


def _count(row: Row, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Occurrences in the output [vocab] and presence anywhere [vocab]; adds only the ids that are new."""
    if row.output_counts is None or row.seen is None:
        row.output_counts, row.seen = torch.zeros(vocab), torch.zeros(vocab, dtype=torch.bool)
    new = row.tokens[row.counted :]
    if new:
        row.seen[torch.tensor(new)] = True
        output = torch.tensor(row.tokens[max(row.counted, row.prompt_len) :], dtype=torch.long)
        row.output_counts.index_add_(0, output, torch.ones(len(output)))
        row.counted = len(row.tokens)
    return row.output_counts, row.seen
