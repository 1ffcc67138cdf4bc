"""``logit_bias``: a number added to the scores of some ids."""

from __future__ import annotations

import torch

from tuili.core.params import SamplingParams
from tuili.runtime.device import send
from tuili.runtime.rows import Row
from tuili.runtime.rules import rules


@rules.register("logit_bias")
class LogitBias:
    order = 40
    reads_tokens = False

    def wants(self, params: SamplingParams) -> bool:
        return bool(params.logit_bias)

    def applies(self, row: Row, position: int) -> bool:
        return True

    def apply(self, scores: torch.Tensor, row: Row, position: int) -> None:
        bias = row.params.logit_bias or {}
        scores[send(list(bias), scores.device)] += send(list(bias.values()), scores.device)
