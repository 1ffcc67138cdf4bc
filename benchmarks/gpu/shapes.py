"""Models of real shapes with random weights, made on the device: no files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tuili.layers.build import Build
from tuili.layers.decoder import Decoder
from tuili.layers.spec import ModelSpec
from tuili.models import family_of
from tuili.ops import Kernels
from tuili.quant.scheme import Scheme

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
QWEN3_06B = {
    **LLAMA_8B,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
CONFIGS = {"Llama-3.1-8B": LLAMA_8B, "Qwen3-0.6B": QWEN3_06B}
#: What ``--tiny`` makes of them.
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """A model in a width: ``scheme`` of its matrices, None for bfloat16 as it is; ``peak`` names what multiplies."""

    model: str
    width: str
    scheme: Scheme | None
    peak: str

    @property
    def name(self) -> str:
        return f"{self.model} {self.width}"


def config_of(model: str, tiny: bool) -> dict[str, Any]:
    """Its config.json."""
    return {**CONFIGS[model], **(TINY if tiny else {})}


def spec_of(model: str, tiny: bool) -> ModelSpec:
    config = config_of(model, tiny)
    return family_of(config).parse(config)


def build(spec: ModelSpec, scheme: Scheme | None, device: str, max_len: int, kernels: Kernels) -> Decoder:
    """Random weights, normal with a deviation of 1/sqrt(inputs), so that activations stay in range."""
    with torch.device("meta"):
        decoder = Decoder(spec, Build(kernels))
    decoder = decoder.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    torch.manual_seed(0)
    for parameter in decoder.parameters():
        if parameter.ndim == 1:
            parameter.fill_(1 - spec.norm_offset)
        else:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
    decoder.prepare(max_len)
    if scheme is not None:
        decoder.store(scheme)
    return decoder
