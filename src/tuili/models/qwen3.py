"""Qwen 3 (dense): Q and K are normalized per head. Yang et al. 2025, arXiv:2505.09388."""

from __future__ import annotations

from typing import Any

from tuili.layers.spec import ModelSpec
from tuili.models import Family, families
from tuili.models.fields import Fields
from tuili.models.names import LLAMA, QK_NORM
from tuili.models.parse import decoder, upper_windows


@families.register("Qwen3ForCausalLM")
class Qwen3(Family):
    names = LLAMA | QK_NORM

    @staticmethod
    def parse(config: dict[str, Any]) -> ModelSpec:
        # Qwen 3 does not derive the head size from the hidden size: it is 128 where the file says nothing.
        fields = Fields(config, defaults={"head_dim": 128})
        bias = fields.flag("attention_bias")
        return decoder(
            fields, "Qwen3ForCausalLM", qkv_bias=bias, out_bias=bias, qk_norm=True, windows=upper_windows(fields)
        )
