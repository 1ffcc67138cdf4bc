"""Gemma 2: soft caps, every other layer with a window, norms before and after. arXiv:2408.00118."""

from __future__ import annotations

from typing import Any

from tuili.layers.spec import ModelSpec
from tuili.models import Family, families
from tuili.models.fields import Fields
from tuili.models.names import ENDS, PRE_POST_NORMS, SPLIT_MLP, SPLIT_QKV
from tuili.models.parse import FULL, SLIDING, decoder, windows

#: Files may leave these out.
DEFAULTS = {"head_dim": 256, "tie_word_embeddings": True, "max_position_embeddings": 8192}


@families.register("Gemma2ForCausalLM")
class Gemma2(Family):
    names = ENDS | SPLIT_QKV | SPLIT_MLP | PRE_POST_NORMS

    @staticmethod
    def parse(config: dict[str, Any]) -> ModelSpec:
        fields = Fields(config, defaults=DEFAULTS)
        fields.refuse("use_bidirectional_attention", "a decoder looks back only")
        bias = fields.flag("attention_bias")
        kinds = [FULL if i % 2 else SLIDING for i in range(fields.integer("num_hidden_layers"))]
        return decoder(
            fields,
            "Gemma2ForCausalLM",
            # Not hidden_act: early files say "gelu" there by mistake, and mean the formula with tanh.
            activation=fields.activation("hidden_activation", default="gelu_pytorch_tanh"),
            qkv_bias=bias,
            out_bias=bias,
            norm_offset=1.0,
            post_norms=True,
            embed_scale=fields.integer("hidden_size") ** 0.5,
            attention_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
            attention_softcap=fields.maybe("attn_logit_softcapping", 50.0),
            logit_softcap=fields.maybe("final_logit_softcapping", 30.0),
            windows=windows(fields, fields.maybe_integer("sliding_window", 4096), kinds),
        )
