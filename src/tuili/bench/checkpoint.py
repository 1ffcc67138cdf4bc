"""Checkpoints with random weights, to measure speed on shapes whose weights are not here. Torch comes with the call."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import tuili
from tuili.models import family_of, make_decoder
from tuili.models.checkpoint import EMBEDDED

#: The embedded model's shape made 28 times larger: 155 M parameters, 310 MB in bfloat16, beyond any cache.
SCALED: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def write_random(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """A checkpoint of ``config`` (config.json) in ``folder``: matrices normal with a deviation of 1/sqrt(inputs), norms
    one, biases zero, the embedded model's tokenizer."""
    import torch
    from safetensors.torch import save_file

    from tuili.models.weights import to_hf

    spec = family_of(config).parse(config)
    with torch.device("meta"):
        model = make_decoder(spec)
    model.to(getattr(torch, spec.dtype)).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: part.contiguous() for name, part in to_hf(model)}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    own = Path(tuili.__file__).parent / EMBEDDED["embedded"]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if (own / file).is_file():
            shutil.copy(own / file, folder / file)
    return folder
