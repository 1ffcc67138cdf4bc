"""Tiny random checkpoints of every family, written by transformers: the oracle that models and engine are held to.

``make_tiny("llama", directory)`` writes one; the session fixture ``tiny`` makes each once: ``tiny("gemma2") -> Path``.
``reference_logits`` and ``reference_greedy`` are what transformers answers. No test compares Tuili with itself only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

VOCAB = 320
END, START_TURN, END_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 258,
    "pad_token_id": 256,
}
SHORT = [1.0, 1.1, 1.2, 1.4, 1.6, 2.0, 2.4, 3.0]
LONG = [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0]


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **settings}}


#: Case name: transformers' class of the family, and what differs from SHAPE.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama1": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "llama-linear": ("Llama", rope("linear", factor=4.0)),
    "llama-dynamic": ("Llama", rope("dynamic", factor=2.0)),
    "llama3": (
        "Llama",
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama-yarn": ("Llama", rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "llama-yarn-mscale": (
        "Llama",
        rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=64,
            beta_fast=16.0,
            mscale=0.8,
            mscale_all_dim=0.5,
            truncate=False,
        ),
    ),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "mistral-full": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 32,
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "num_hidden_layers": 4,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 32,
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "num_hidden_layers": 6,
            "sliding_window_pattern": 3,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
    ),
    "phi3": (
        "Phi3",
        {"sliding_window": 30, "num_attention_heads": 2, "num_key_value_heads": 1}
        | rope("default", partial_rotary_factor=0.75),
    ),
    "phi3-longrope": (
        "Phi3",
        {"original_max_position_embeddings": 64}
        | rope("longrope", short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=64),
    ),
}
#: The longest sequence at which transformers and Tuili mean the same: with these ropes, ``max_model_len`` chooses the
#: frequencies of all positions, while transformers chooses by the sequence so far (see tuili/layers/rope.py).
LONGEST = {"phi3-longrope": 64}


def max_model_len(case: str) -> int:
    """The ``max_model_len`` with which ``case`` must equal transformers at every length up to it."""
    return LONGEST.get(case, 256)


def make_tiny(
    family: str, directory: Path, dtype: str = "float32", seed: int = 0, shard: str | None = None, **overrides: Any
) -> Path:
    """Write a random checkpoint of the case ``family`` with a byte-level tokenizer; ``overrides`` go to its config.

    ``shard`` is the largest file ("100KB"); weights differ enough for greedy text to be lively.
    """
    import transformers

    name, changes = CASES[family]
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **changes, **overrides})
    torch.manual_seed(seed)
    architecture = name.removesuffix("Text") + "ForCausalLM"
    model = getattr(transformers, architecture)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms start at one and biases at zero: a mixed-up pair of them would not show
                parameter.add_(torch.randn_like(parameter) * 0.3)
        if model.config.tie_word_embeddings:  # else each token predicts itself
            model.get_input_embeddings().weight.mul_(0.1)
            model.model.norm.weight.add_(9.0)
    model.to(getattr(torch, dtype)).save_pretrained(directory, **({"max_shard_size": shard} if shard else {}))
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    """256 bytes and three special tokens; every text is as many tokens as it has UTF-8 bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END, START_TURN, END_TURN])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_TURN,
        "pad_token": END,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 256,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def prompt(length: int, seed: int = 0) -> list[int]:
    """``length`` random byte tokens."""
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@lru_cache(maxsize=4)
def reference(directory: Path, dtype: str = "float32") -> Any:
    """The checkpoint in transformers, with the attention whose formula is written out."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()


@torch.no_grad()
def reference_logits(directory: Path, ids: list[int], dtype: str = "float32") -> torch.Tensor:
    """transformers' scores after every token of ``ids``: float32 [len(ids), vocab]."""
    return reference(directory, dtype)(torch.tensor([ids]), use_cache=False).logits[0].float()


def reference_greedy(directory: Path, ids: list[int], count: int) -> list[int]:
    """``count`` tokens by a naive loop: all of the text through transformers again for each; never stops early."""
    text = list(ids)
    for _ in range(count):
        text.append(int(reference_logits(directory, text)[-1].argmax()))
    return text[len(ids) :]


class Tiny:
    """``tiny(case, **options of make_tiny)``: that checkpoint's directory below ``root``, made once."""

    def __init__(self, root: Callable[[str], Path]):
        self.root = root
        self.made: dict[str, Path] = {}

    def __call__(self, case: str, **options: Any) -> Path:
        key = f"{case} {sorted(options.items())}"
        if key not in self.made:
            self.made[key] = make_tiny(case, self.root(case), **options)
        return self.made[key]
