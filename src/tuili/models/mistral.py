"""Mistral: Llama with a sliding window. Jiang et al. 2023, arXiv:2310.06825."""

from __future__ import annotations

from typing import Any

from tuili.layers.spec import ModelSpec
from tuili.models import Family, families
from tuili.models.fields import Fields
from tuili.models.names import LLAMA
from tuili.models.parse import SLIDING, decoder, windows


@families.register("MistralForCausalLM")
class Mistral(Family):
    names = LLAMA

    @staticmethod
    def parse(config: dict[str, Any]) -> ModelSpec:
        fields = Fields(config)
        # A window of null means none (v0.2 and later); a file that says nothing means the first release's 4096.
        window = fields.maybe_integer("sliding_window", 4096)
        kinds = [SLIDING] * fields.integer("num_hidden_layers")
        return decoder(fields, "MistralForCausalLM", windows=windows(fields, window, kinds))
