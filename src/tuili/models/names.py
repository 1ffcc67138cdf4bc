"""Weight names as tables: a checkpoint's module name to ours. No torch.

``{layer}`` stands for the layer's number, ``{expert}`` for that of one of a layer's experts.

A value is our module, or ``(module, part)`` where the checkpoint's tensor is the ``part``-th of the projections that we
fuse into one weight. ``.weight`` and ``.bias`` are added where our module has them.
"""

from __future__ import annotations

from collections.abc import Iterator

Names = dict[str, str | tuple[str, int]]

#: What every checkpoint calls its tables between tokens and vectors.
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
ENDS: Names = {
    EMBEDDING: "embedding",
    "model.norm": "norm",
    HEAD: "head",
}
SPLIT_QKV: Names = {
    "model.layers.{layer}.self_attn.q_proj": ("layers.{layer}.attention.qkv_proj", 0),
    "model.layers.{layer}.self_attn.k_proj": ("layers.{layer}.attention.qkv_proj", 1),
    "model.layers.{layer}.self_attn.v_proj": ("layers.{layer}.attention.qkv_proj", 2),
    "model.layers.{layer}.self_attn.o_proj": "layers.{layer}.attention.o_proj",
}
QK_NORM: Names = {
    "model.layers.{layer}.self_attn.q_norm": "layers.{layer}.attention.q_norm",
    "model.layers.{layer}.self_attn.k_norm": "layers.{layer}.attention.k_norm",
}
SPLIT_MLP: Names = {
    "model.layers.{layer}.mlp.gate_proj": ("layers.{layer}.mlp.gate_up_proj", 0),
    "model.layers.{layer}.mlp.up_proj": ("layers.{layer}.mlp.gate_up_proj", 1),
    "model.layers.{layer}.mlp.down_proj": "layers.{layer}.mlp.down_proj",
}
FUSED: Names = {
    "model.layers.{layer}.self_attn.qkv_proj": "layers.{layer}.attention.qkv_proj",
    "model.layers.{layer}.self_attn.o_proj": "layers.{layer}.attention.o_proj",
    "model.layers.{layer}.mlp.gate_up_proj": "layers.{layer}.mlp.gate_up_proj",
    "model.layers.{layer}.mlp.down_proj": "layers.{layer}.mlp.down_proj",
}
PRE_NORMS: Names = {
    "model.layers.{layer}.input_layernorm": "layers.{layer}.attention_norm",
    "model.layers.{layer}.post_attention_layernorm": "layers.{layer}.mlp_norm",
}
#: Gemma 2 and 3. Beware: ``post_attention_layernorm`` is another norm here than in Llama.
PRE_POST_NORMS: Names = {
    "model.layers.{layer}.input_layernorm": "layers.{layer}.attention_norm",
    "model.layers.{layer}.post_attention_layernorm": "layers.{layer}.attention_post_norm",
    "model.layers.{layer}.pre_feedforward_layernorm": "layers.{layer}.mlp_norm",
    "model.layers.{layer}.post_feedforward_layernorm": "layers.{layer}.mlp_post_norm",
}
#: Llama's layout, which Mistral and Qwen 2 share.
LLAMA: Names = ENDS | SPLIT_QKV | SPLIT_MLP | PRE_NORMS


def expand(names: Names, layers: int, experts: int = 0) -> Iterator[tuple[str, str, int | None]]:
    """The checkpoint's module, ours, and which part of ours it is (None: all of it), for every module of a model."""
    for pattern, target in names.items():
        ours, part = (target, None) if isinstance(target, str) else target
        for layer in range(layers if "{layer}" in pattern else 1):
            for expert in range(experts if "{expert}" in pattern else 1):
                numbers = {"layer": layer, "expert": expert}
                yield pattern.format(**numbers), ours.format(**numbers), part


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
