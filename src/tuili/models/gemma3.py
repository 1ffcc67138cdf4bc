"""Gemma 3, the text model: five windowed layers to each full one, two ropes, normalized Q and K. arXiv:2503.19786."""

from __future__ import annotations

from typing import Any, ClassVar

from tuili.layers.spec import ModelSpec
from tuili.models import Family, families
from tuili.models.fields import Fields
from tuili.models.names import ENDS, PRE_POST_NORMS, QK_NORM, SPLIT_MLP, SPLIT_QKV
from tuili.models.parse import FULL, SLIDING, decoder, head_size, layer_rope, rope_spec, windows

#: Google's own files leave out what equals these.
DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}


@families.register("Gemma3ForCausalLM")
class Gemma3(Family):
    names = ENDS | SPLIT_QKV | SPLIT_MLP | PRE_POST_NORMS | QK_NORM

    @staticmethod
    def parse(config: dict[str, Any]) -> ModelSpec:
        fields = Fields(config, defaults=DEFAULTS)
        fields.refuse("use_bidirectional_attention", "a decoder looks back only")
        fields.refuse("attn_logit_softcapping", "Gemma 3 has no soft cap in attention")
        head_dim = head_size(fields)
        bias = fields.flag("attention_bias")
        return decoder(
            fields,
            "Gemma3ForCausalLM",
            rope=rope_spec(fields, layer_rope(fields, FULL, 1_000_000.0), head_dim),
            window_rope=rope_spec(fields, _local_rope(fields), head_dim),
            # Unlike elsewhere, the linear factor is already in max_position_embeddings.
            max_model_len=fields.integer("max_position_embeddings"),
            activation=fields.activation("hidden_activation", default="gelu_pytorch_tanh"),
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=True,
            norm_offset=1.0,
            post_norms=True,
            embed_scale=fields.integer("hidden_size") ** 0.5,
            attention_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
            logit_softcap=fields.maybe("final_logit_softcapping"),
            windows=windows(fields, fields.maybe_integer("sliding_window", 4096), _kinds(fields)),
        )


def _local_rope(fields: Fields) -> dict[str, Any]:
    """Windowed layers rotate with their own base and are never stretched."""
    if {FULL, SLIDING} & fields.table("rope_parameters").keys():
        return layer_rope(fields, SLIDING, base="rope_local_base_freq")
    return {"rope_theta": fields.number("rope_local_base_freq", 10_000.0)}


def _kinds(fields: Fields) -> list[str]:
    """Every sixth layer (or as the file says) sees everything."""
    every = fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", 6))
    return [SLIDING if (i + 1) % every else FULL for i in range(fields.integer("num_hidden_layers"))]


@families.register("Gemma3ForConditionalGeneration")
class Gemma3Multimodal(Family):
    """The text part of a checkpoint that also sees images; the vision tower is left on the disk."""

    names = Gemma3.names
    #: Both layouts of the text model's names: as published, and as transformers 5 keeps them in memory.
    prefixes: ClassVar = {
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "model.language_model.": "model.",
    }
    ignored = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")

    @staticmethod
    def parse(config: dict[str, Any]) -> ModelSpec:
        text = Fields(config).table("text_config")
        outer = {k: config.get(k) for k in ("dtype", "torch_dtype", "eos_token_id", "tie_word_embeddings")}
        return Gemma3.parse(text | {k: v for k, v in outer.items() if v is not None})
