"""Qwen 2 and 2.5: Llama with biases on Q, K and V. Yang et al. 2024, arXiv:2407.10671."""

from __future__ import annotations

from typing import Any

from tuili.layers.spec import ModelSpec
from tuili.models import Family, families
from tuili.models.fields import Fields
from tuili.models.names import LLAMA
from tuili.models.parse import decoder, upper_windows


@families.register("Qwen2ForCausalLM")
class Qwen2(Family):
    names = LLAMA

    @staticmethod
    def parse(config: dict[str, Any]) -> ModelSpec:
        fields = Fields(config)
        return decoder(fields, "Qwen2ForCausalLM", qkv_bias=True, windows=upper_windows(fields))
