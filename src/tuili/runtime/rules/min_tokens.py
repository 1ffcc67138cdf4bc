"""``min_tokens``: nothing that ends the text can be chosen before so many tokens."""

from __future__ import annotations

import torch

from tuili.core.params import SamplingParams
from tuili.runtime.device import send
from tuili.runtime.rows import Row
from tuili.runtime.rules import rules


@rules.register("min_tokens")
class MinTokens:
    order = 30
    reads_tokens = False

    def wants(self, params: SamplingParams) -> bool:
        return params.min_tokens > 0 and bool(params.stop_ids)

    def applies(self, row: Row, position: int) -> bool:
        return position - row.prompt_len < row.params.min_tokens

    def apply(self, scores: torch.Tensor, row: Row, position: int) -> None:
        scores.index_fill_(0, send(list(row.params.stop_ids), scores.device), -torch.inf)
