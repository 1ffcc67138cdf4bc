"""``allowed_token_ids``: no other id can be chosen."""

from __future__ import annotations

import torch

from tuili.core.params import SamplingParams
from tuili.runtime.device import send
from tuili.runtime.rows import Row
from tuili.runtime.rules import rules


@rules.register("allowed_token_ids")
class AllowedIds:
    order = 10
    reads_tokens = False

    def wants(self, params: SamplingParams) -> bool:
        return params.allowed_token_ids is not None

    def applies(self, row: Row, position: int) -> bool:
        return True

    def apply(self, scores: torch.Tensor, row: Row, position: int) -> None:
        keep = torch.full_like(scores, -torch.inf)
        ids = send(row.params.allowed_token_ids or (), scores.device)
        keep[ids] = scores[ids]
        scores.copy_(keep)
