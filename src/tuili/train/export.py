"""A recipe's model as others see it: config.json, and trained weights in a Hugging Face directory (LlamaForCausalLM).

The spec that is trained is parsed from the config.json that is written: what was trained is what is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from tuili.layers.spec import ModelSpec
from tuili.models import family_of, make_decoder
from tuili.models.weights import to_hf
from tuili.train import tokenizer as bpe
from tuili.train.recipe import Recipe

#: Ids that end an answer, and the one that fills unused places: <|im_end|>, <|endoftext|>.
END_IDS, PAD_ID = [2, 0], 0


def hf_config(recipe: Recipe) -> dict[str, Any]:
    """config.json of the recipe's model."""
    m = recipe.model
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": recipe.tokenizer.vocab_size,
        "hidden_size": m.hidden_size,
        "intermediate_size": m.intermediate_size,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_heads,
        "num_key_value_heads": m.num_kv_heads,
        "head_dim": m.head_dim,
        "max_position_embeddings": recipe.data.max_len,
        "rope_theta": m.rope_theta,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": END_IDS,
        "pad_token_id": PAD_ID,
        "torch_dtype": "bfloat16",
    }


def model_spec(recipe: Recipe) -> ModelSpec:
    config = hf_config(recipe)
    return family_of(config).parse(config)


def model_directory(folder: Path, recipe: Recipe, weights: dict[str, torch.Tensor], tokenizer: Tokenizer) -> None:
    """Write config.json, generation_config.json, model.safetensors (bf16) and the tokenizer's files to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    model = make_decoder(model_spec(recipe))
    model.load_state_dict(weights)
    save_file(
        {n: w.bfloat16().cpu().contiguous() for n, w in to_hf(model)}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "model.safetensors").chmod(0o644)
    write(folder / "config.json", hf_config(recipe))
    generation = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "eos_token_id": END_IDS, "pad_token_id": PAD_ID}
    write(folder / "generation_config.json", generation)
    bpe.save(tokenizer, folder, recipe.data.max_len)


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
