"""Checkpoints of real shapes with random weights, as Hugging Face directories with a tokenizer that every rival reads.

Written without torch's model classes: the names of Llama and Qwen3 are few. Weights are normal with a standard
deviation of 1/sqrt(inputs), so that activations stay in range; logits are nearly flat, which makes the agreement of
first tokens a hard test.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rivals.rival import Places, call

if TYPE_CHECKING:
    import torch

#: Rises when what is written here changes, so that a cached checkpoint is made again.
VERSION = "1"

#: Ids below are left out of prompts: they may be special.
FIRST_ID = 300


@dataclass(frozen=True)
class Shape:
    """``share`` weighs this model's part of the time budget; 0 takes what the others leave."""

    name: str
    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    theta: float
    share: float
    positions: int = 4096

    @property
    def body(self) -> int:
        """Weights of all layers' matrices."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn)

    @property
    def head(self) -> int:
        return self.hidden * self.vocab

    def kv_bytes(self, positions: int, itemsize: int = 2) -> int:
        return positions * self.layers * 2 * self.kv_heads * self.head_dim * itemsize


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-0.6b", "qwen3", 1024, 28, 16, 8, 128, 3072, 151936, 1e6, 1.0),
        Shape("llama15m", "llama", 288, 6, 6, 6, 48, 768, 32000, 1e4, 0.2),
        Shape("embedded", "llama", 256, 6, 4, 2, 64, 704, 4096, 1e4, 0.0, 1536),
        Shape("llama3.2-1b", "llama", 2048, 16, 32, 8, 64, 8192, 128256, 5e5, 0.0),
    )
}


def prepare(shape: Shape, places: Places) -> None:
    """Make the checkpoint unless this version of it is there; the embedded model is copied."""
    folder = places.checkpoint(shape.name)
    done = folder / ".version"
    if done.exists() and done.read_text() == VERSION:
        return
    shutil.rmtree(folder, ignore_errors=True)
    if shape.name == "embedded":
        import tuili

        shutil.copytree(Path(tuili.__file__).parent / "embedded" / "target", folder)
    else:
        # In a process of its own: the harness must not hold gigabytes while it measures.
        call(Path(sys.executable), make, [shape.name, folder], places.log(f"make-{shape.name}"))
    done.write_text(VERSION)


def make(name: str, folder: str) -> None:
    write(SHAPES[name], Path(folder))


def write(shape: Shape, folder: Path) -> None:
    """The files of a checkpoint."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: _random(size, generator) for name, size in sizes(shape)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(shape), indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(shape.vocab)))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=1))


def _random(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    import torch

    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return (torch.randn(size, generator=generator) / math.sqrt(size[1])).bfloat16()


def sizes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and size of every tensor; the head is tied to the embeddings."""
    hidden, query, key = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab, hidden)
    yield "model.norm.weight", (hidden,)
    for index in range(shape.layers):
        layer = f"model.layers.{index}"
        yield f"{layer}.self_attn.q_proj.weight", (query, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (key, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (key, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, query)
        yield f"{layer}.mlp.gate_proj.weight", (shape.ffn, hidden)
        yield f"{layer}.mlp.up_proj.weight", (shape.ffn, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, shape.ffn)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        if shape.family == "qwen3":
            yield f"{layer}.self_attn.q_norm.weight", (shape.head_dim,)
            yield f"{layer}.self_attn.k_norm.weight", (shape.head_dim,)


def config(shape: Shape) -> dict[str, Any]:
    architecture = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[shape.family]
    return {
        "architectures": [architecture],
        "model_type": shape.family,
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.positions,
        "rope_theta": shape.theta,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }


SPECIAL = ("<pad>", "<s>", "</s>")

TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": "<pad>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "clean_up_tokenization_spaces": False,
    "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
}


def tokenizer(vocab: int) -> dict[str, Any]:
    """Byte-level BPE of exactly ``vocab`` entries: specials, bytes, pairs of letters, then words nothing merges into.

    Every id has a text, so that no rival fails to decode one.
    """
    from tokenizers import pre_tokenizers

    letters = "abcdefghijklmnop"
    merges = [[a, b] for a in letters[:4] for b in letters[:4]]
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    words += [f"Ġw{index}" for index in range(vocab - len(words))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": index,
                "content": word,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, word in enumerate(SPECIAL)
        ],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {word: index for index, word in enumerate(words)},
            "merges": merges,
        },
    }
