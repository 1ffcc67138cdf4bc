"""``bad_words``: the last id of a forbidden sequence can not be chosen where the text ends with the ids before it."""

from __future__ import annotations

import torch

from tuili.core.params import SamplingParams
from tuili.runtime.rows import Row
from tuili.runtime.rules import rules


@rules.register("bad_words")
class BadWords:
    order = 20
    reads_tokens = True

    def wants(self, params: SamplingParams) -> bool:
        return bool(params.bad_words_ids)

    def applies(self, row: Row, position: int) -> bool:
        return True

    def apply(self, scores: torch.Tensor, row: Row, position: int) -> None:
        for word in row.params.bad_words_ids:
            if _ends_with(row.tokens, word[:-1]):
                scores[word[-1]].fill_(-torch.inf)


def _ends_with(tokens: list[int], tail: tuple[int, ...]) -> bool:
    return not tail or (len(tokens) >= len(tail) and tuple(tokens[-len(tail) :]) == tail)
