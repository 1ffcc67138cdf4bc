"""Weight names as tables: a checkpoint's module name to ours. ``{}`` stands for the layer's number; no torch.

A value is our module, or ``(module, part)`` where the checkpoint's tensor is the ``part``-th of the projections that we
fuse into one weight. ``.weight`` and ``.bias`` are added where our module has them.
"""

from __future__ import annotations

Names = dict[str, str | tuple[str, int]]

ENDS: Names = {
    "model.embed_tokens": "embedding",
    "model.norm": "norm",
    "lm_head": "head",
}
SPLIT_QKV: Names = {
    "model.layers.{}.self_attn.q_proj": ("layers.{}.attention.qkv_proj", 0),
    "model.layers.{}.self_attn.k_proj": ("layers.{}.attention.qkv_proj", 1),
    "model.layers.{}.self_attn.v_proj": ("layers.{}.attention.qkv_proj", 2),
    "model.layers.{}.self_attn.o_proj": "layers.{}.attention.o_proj",
}
QK_NORM: Names = {
    "model.layers.{}.self_attn.q_norm": "layers.{}.attention.q_norm",
    "model.layers.{}.self_attn.k_norm": "layers.{}.attention.k_norm",
}
SPLIT_MLP: Names = {
    "model.layers.{}.mlp.gate_proj": ("layers.{}.mlp.gate_up_proj", 0),
    "model.layers.{}.mlp.up_proj": ("layers.{}.mlp.gate_up_proj", 1),
    "model.layers.{}.mlp.down_proj": "layers.{}.mlp.down_proj",
}
FUSED: Names = {
    "model.layers.{}.self_attn.qkv_proj": "layers.{}.attention.qkv_proj",
    "model.layers.{}.self_attn.o_proj": "layers.{}.attention.o_proj",
    "model.layers.{}.mlp.gate_up_proj": "layers.{}.mlp.gate_up_proj",
    "model.layers.{}.mlp.down_proj": "layers.{}.mlp.down_proj",
}
PRE_NORMS: Names = {
    "model.layers.{}.input_layernorm": "layers.{}.attention_norm",
    "model.layers.{}.post_attention_layernorm": "layers.{}.mlp_norm",
}
#: Gemma 2 and 3. Beware: ``post_attention_layernorm`` is another norm here than in Llama.
PRE_POST_NORMS: Names = {
    "model.layers.{}.input_layernorm": "layers.{}.attention_norm",
    "model.layers.{}.post_attention_layernorm": "layers.{}.attention_post_norm",
    "model.layers.{}.pre_feedforward_layernorm": "layers.{}.mlp_norm",
    "model.layers.{}.post_feedforward_layernorm": "layers.{}.mlp_post_norm",
}
#: Llama's layout, which Mistral and Qwen 2 share.
LLAMA: Names = ENDS | SPLIT_QKV | SPLIT_MLP | PRE_NORMS

#: In old checkpoints, but computed from config.json and not parameters.
NOT_PARAMETERS = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")
#: In quantized checkpoints: ranges of attention and the KV cache, whose type is an option here.
CACHE_SCALES = (
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".kv_scale",
    ".prob_scale",
    "k_proj.output_scale",
    "v_proj.output_scale",
)
