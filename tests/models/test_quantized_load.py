"""Rounding while a checkpoint streams in: the same bits as rounding a loaded model, in no more memory than it takes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from processes import peak_memory, reset_peak_memory, resident_memory
from safetensors.torch import save_file
from tiny_models import CASES, SHAPE, Tiny, prompt

from tuili import LLM, SamplingParams, ops
from tuili.base.errors import ConfigError
from tuili.layers.decoder import Decoder
from tuili.layers.linear import Matrix
from tuili.layers.sizes import weight_bytes
from tuili.models.checkpoint import open_checkpoint
from tuili.models.weights import load_model, to_hf
from tuili.ops import Kernels, cpu
from tuili.quant import weight as weights
from tuili.quant.scheme import GROUPS, SCHEMES, Scheme, scheme_of

ALL = [*SCHEMES.values(), *(scheme_of("int4", group) for group in GROUPS[1:]), Scheme("int4", 64, symmetric=False)]


def load(path: Path, scheme: Scheme | None, dtype: str = "bfloat16", kernels: Kernels | None = None) -> Decoder:
    return load_model(open_checkpoint(path), dtype, 256, scheme=scheme, kernels=kernels)


def matrices(model: Decoder) -> dict[str, Matrix]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Matrix)}


@pytest.mark.parametrize("scheme", ALL, ids=str)
@pytest.mark.parametrize("case", ["llama-bias", "qwen3", "phi3"])
def test_streamed_is_loaded_then_stored(case: str, scheme: Scheme, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slice by slice, also across the tensors that a fused weight is made of; from the checkpoint's own numbers."""
    expected = load(tiny(case), None, "float32")
    expected.store(scheme)
    monkeypatch.setattr(weights, "SLICE", 16 * 64)
    kernels = ops.kernels_of("cpu" if cpu.describe().built else "reference")
    have = load(tiny(case), scheme, "float32", kernels)
    plain = dict(expected.named_parameters())
    assert plain.keys() == dict(have.named_parameters()).keys()
    assert all(torch.equal(value, plain[name]) for name, value in have.named_parameters())
    for name, matrix in matrices(expected).items():
        stored = matrices(have)[name].stored
        assert matrix.stored is not None
        assert stored is not None
        assert stored.tensors.keys() == matrix.stored.tensors.keys()
        for key, tensor in stored.tensors.items():
            assert torch.equal(tensor, matrix.stored.tensors[key]), (name, key)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_the_memory_table_counts_what_is_stored(case: str, dtype: str, tiny: Tiny) -> None:
    spec = open_checkpoint(tiny(case)).spec
    for scheme in ALL:
        model = load(tiny(case), scheme, dtype)
        stored = sum(matrix.stored.nbytes for matrix in matrices(model).values() if matrix.stored)
        plain = sum(p.nbytes for p in model.parameters())
        assert weight_bytes(spec, dtype, scheme) == stored + plain, scheme


@pytest.mark.parametrize("scheme", ALL, ids=str)
def test_to_hf_gives_what_the_weights_mean(scheme: Scheme, tiny: Tiny) -> None:
    original = dict(to_hf(load(tiny("qwen2"), None)))
    written = dict(to_hf(load(tiny("qwen2"), scheme)))
    assert written.keys() == original.keys()
    error = {"int8": 0.01, "int4": 0.2, "fp8": 0.04}.get(scheme.format, 0.0)  # fp8: half of 448's last bit
    for name, tensor in original.items():
        rounded = error if tensor.dim() == 2 else 0.0
        assert float((written[name].float() - tensor.float()).abs().max()) <= rounded * float(
            tensor.float().abs().max()
        )


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_loading_takes_the_weights_and_little_more(quantization: str, tmp_path: Path) -> None:
    """80 MB of bfloat16, read from mapped pages that are given back: never a second copy, never the file beside it."""
    shape = {**SHAPE, "vocab_size": 16384, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    config = {**shape, "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = open_checkpoint(tmp_path).spec
    with torch.device("meta"):
        meta = Decoder(spec)
    tensors = {name: torch.full(t.shape, 0.25, dtype=torch.bfloat16) for name, t in to_hf(meta)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    del tensors
    scheme = SCHEMES[quantization]
    kernels = ops.kernels_of("cpu" if cpu.describe().built else "reference")
    load(tmp_path, scheme, kernels=kernels)  # code is loaded, and the allocator has its arenas
    reset_peak_memory()
    before = resident_memory()
    model = load(tmp_path, scheme, kernels=kernels)
    taken = peak_memory() - before
    size = weight_bytes(spec, "bfloat16", scheme)
    assert size <= taken + (8 << 20), "the measurement misses the weights"
    assert taken <= 1.05 * size + (24 << 20)
    assert matrices(model)


def test_llm_takes_it_and_unknown_ones_are_named(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    for options in ({}, {"kernels": "reference"}):
        caplog.clear()
        with caplog.at_level(logging.INFO, "tuili"), LLM(str(tiny("llama")), quantization="int4", **options) as llm:
            assert llm.engine.config.quantization_group_size == 32
            assert len(llm.generate([prompt(20)], params, use_tqdm=False)[0].outputs[0].token_ids) == 5
        slow = bool(options) or not cpu.describe().built
        assert ("int4 on torch's references" in caplog.text) == slow
    with pytest.raises(ConfigError, match=r"--quantization cannot be 'int5'\. Did you mean 'int[48]'\? Known: fp8, "):
        LLM(str(tiny("llama")), quantization="int5")
