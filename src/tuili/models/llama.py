"""Llama 1 to 3.2 and what copies its layout (Yi, Vicuna, CodeLlama, SmolLM). Touvron et al. 2023, arXiv:2302.13971."""

from __future__ import annotations

from typing import Any

from tuili.layers.spec import ModelSpec
from tuili.models import Family, families
from tuili.models.fields import Fields
from tuili.models.names import LLAMA
from tuili.models.parse import decoder


@families.register("LlamaForCausalLM", "LLaMAForCausalLM")
class Llama(Family):
    names = LLAMA

    @staticmethod
    def parse(config: dict[str, Any]) -> ModelSpec:
        fields = Fields(config)
        bias = fields.flag("attention_bias")
        return decoder(fields, "LlamaForCausalLM", qkv_bias=bias, out_bias=bias, mlp_bias=fields.flag("mlp_bias"))
