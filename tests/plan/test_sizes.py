"""The memory formulas (INVENTORY rows 16, 17, 20), held to what is really stored: safetensors files, packed weights,
KV pools, and published parameter counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from tiny_models import CASES

from tuili.base.errors import ConfigError
from tuili.layers.decoder import Decoder
from tuili.layers.kvspec import kv_specs
from tuili.layers.linear import Embedding, Linear
from tuili.layers.sizes import (
    kv_bytes_per_position,
    parameter_count,
    parameters,
    pool_bytes,
    step_kv_bytes,
    step_weight_bytes,
    weight_bytes,
)
from tuili.models import family_of
from tuili.models.checkpoint import open_checkpoint
from tuili.models.shards import weight_files
from tuili.models.weights import load_model
from tuili.ops.cpu import Arena
from tuili.plan.memory import ways_to_keep
from tuili.plan.model import open_spec
from tuili.quant.formats import format_of
from tuili.quant.scheme import Scheme
from tuili.quant.weight import Weight
from tuili.runtime.host import Host
from tuili.runtime.kvstore import KVStore

if TYPE_CHECKING:
    from tiny_models import Tiny

SCHEMES = [
    Scheme(),
    Scheme("int8"),
    *(Scheme("int4", group, symmetric) for group in (32, 64, 128) for symmetric in (True, False)),
]


def file_bytes(path: Any) -> int:
    """Bytes of the tensors in a checkpoint's files, counted from the files."""
    total = 0
    for file in weight_files(path):
        with safe_open(file, framework="pt") as tensors:
            total += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
    return total


@pytest.mark.parametrize("case", CASES)
def test_weights_are_the_bytes_of_the_files(tiny: Tiny, case: str) -> None:
    spec = open_checkpoint(tiny(case)).spec
    assert weight_bytes(spec, "float32") == file_bytes(tiny(case))
    with torch.device("meta"):
        model = Decoder(spec)
    assert parameters(spec) == {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_half_width_files(tiny: Tiny) -> None:
    path = tiny("gemma3", dtype="bfloat16")
    spec = open_checkpoint(path).spec
    assert weight_bytes(spec, "bfloat16") == weight_bytes(spec, "float16") == file_bytes(path)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("out", "into"), [(16, 32), (41, 37), (1, 1), (96, 320), (17, 129)])
def test_formats_store_what_the_formula_says(scheme: Scheme, dtype: str, out: int, into: int) -> None:
    weight = Weight.of(torch.randn(out, into).to(getattr(torch, dtype)), scheme, Arena())
    assert format_of(scheme, "cpu").bytes(out, into, scheme, dtype) == weight.nbytes


@pytest.mark.parametrize("scheme", [Scheme(), Scheme("int8"), Scheme("int4", 32, False)], ids=lambda s: s.format)
@pytest.mark.parametrize("case", ["llama-bias", "qwen3", "gemma2", "phi3"])
def test_a_stored_model_is_as_large_as_the_formula_says(tiny: Tiny, case: str, scheme: Scheme) -> None:
    checkpoint = open_checkpoint(tiny(case))
    model = load_model(checkpoint, "bfloat16", 64)
    model.store(scheme)
    matrices = [m.stored for m in model.modules() if isinstance(m, Linear | Embedding)]
    total = sum(w.nbytes for w in matrices if w) + sum(p.nbytes for p in model.parameters())
    assert weight_bytes(checkpoint.spec, "bfloat16", scheme) == total


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="int5"):
        format_of(Scheme("int5"), "cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("case", ["llama", "llama1", "llama3", "qwen3", "gemma3", "phi3", "mistral"])
def test_kv_is_the_pool_that_is_allocated(tiny: Tiny, case: str, dtype: str) -> None:
    spec = open_checkpoint(tiny(case)).spec
    store = KVStore(kv_specs(spec, dtype), 7, 16, Host())
    assert pool_bytes(spec, 7, 16, dtype) == store.nbytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_odd_blocks_and_heads_are_padded_as_the_pool_pads_them(tiny: Tiny, dtype: str) -> None:
    spec = replace(open_checkpoint(tiny("llama")).spec, head_dim=7)
    store = KVStore(kv_specs(spec, dtype), 3, 5, Host())
    assert pool_bytes(spec, 3, 5, dtype) == store.nbytes


def test_kv_read_by_a_step_stays_in_the_windows(tiny: Tiny) -> None:
    gemma = open_checkpoint(tiny("gemma2")).spec  # windows of 8 in every other of 4 layers
    per = kv_bytes_per_position(gemma, "float32") // 4
    assert [gemma.window(i) for i in range(4)] == [8, None, 8, None]
    assert step_kv_bytes(gemma, [5], "float32") == 4 * 5 * per
    assert step_kv_bytes(gemma, [100, 5], "float32") == (2 * 8 + 2 * 100 + 4 * 5) * per


def test_a_step_reads_of_an_untied_embedding_only_its_rows(tiny: Tiny) -> None:
    spec = open_checkpoint(tiny("llama")).spec
    embedding = spec.vocab_size * spec.hidden_size * 4
    assert step_weight_bytes(spec, "float32", rows=3) == weight_bytes(spec, "float32") - embedding + 3 * 64 * 4
    tied = open_checkpoint(tiny("llama-tied")).spec
    assert step_weight_bytes(tied, "float32", rows=3) == weight_bytes(tied, "float32")


def llama(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv: int, **more: Any) -> dict[str, Any]:
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shape = dict(zip((*keys, "num_key_value_heads"), (vocab, hidden, inner, layers, heads, kv), strict=True))
    return {"architectures": ["LlamaForCausalLM"], "rope_theta": 1e4, "dtype": "bfloat16"} | shape | more


def of(name: str) -> dict[str, Any]:
    return {"architectures": [f"{name}ForCausalLM"]}


TIED = {"tie_word_embeddings": True}
#: Shapes from the models' config.json, and the parameter counts that their hub pages (safetensors metadata) publish.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-2-7b": (llama(32000, 4096, 11008, 32, 32, 32), 6_738_415_616),
    "Meta-Llama-3-8B": (llama(128256, 4096, 14336, 32, 32, 8), 8_030_261_248),
    "Meta-Llama-3-70B": (llama(128256, 8192, 28672, 80, 64, 8), 70_553_706_496),
    "Llama-3.2-1B": (llama(128256, 2048, 8192, 16, 32, 8, head_dim=64, **TIED), 1_235_814_400),
    "CodeLlama-34b": (llama(32000, 8192, 22016, 48, 64, 8), 33_743_970_304),
    "Yi-34B": (llama(64000, 7168, 20480, 60, 56, 8), 34_388_917_248),
    "Mistral-7B": (llama(32000, 4096, 14336, 32, 32, 8, **of("Mistral")), 7_241_732_096),
    "Mistral-Nemo": (llama(131072, 5120, 14336, 40, 32, 8, head_dim=128, **of("Mistral")), 12_247_782_400),
    "Qwen2.5-0.5B": (llama(151936, 896, 4864, 24, 14, 2, **of("Qwen2"), **TIED), 494_032_768),
    "Qwen2.5-7B": (llama(152064, 3584, 18944, 28, 28, 4, **of("Qwen2")), 7_615_616_512),
    "Qwen3-8B": (llama(151936, 4096, 12288, 36, 32, 8, head_dim=128, **of("Qwen3")), 8_190_735_360),
    "Qwen3-14B": (llama(151936, 5120, 17408, 40, 40, 8, head_dim=128, **of("Qwen3")), 14_768_307_200),
    "Qwen3-32B": (llama(151936, 5120, 25600, 64, 64, 8, head_dim=128, **of("Qwen3")), 32_762_123_264),
    "gemma-2-2b": (llama(256000, 2304, 9216, 26, 8, 4, head_dim=256, **of("Gemma2"), **TIED), 2_614_341_888),
    "gemma-2-9b": (llama(256000, 3584, 14336, 42, 16, 8, head_dim=256, **of("Gemma2"), **TIED), 9_241_705_984),
    "gemma-3-1b": (llama(262144, 1152, 6912, 26, 4, 1, head_dim=256, **of("Gemma3"), **TIED), 999_885_952),
    "Phi-3-mini": (llama(32064, 3072, 8192, 32, 32, 32, **of("Phi3")), 3_821_079_552),
    "phi-4": (llama(100352, 5120, 17920, 40, 40, 10, **of("Phi3")), 14_659_507_200),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name: str) -> None:
    config, published = PUBLISHED[name]
    count = parameter_count(family_of(config).parse(config))
    assert count == pytest.approx(published, rel=0.01)
    assert count == published  # 1 % is asked for; these are exact


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def test_a_quantized_model_from_its_config_alone(tmp_path: Path) -> None:
    """Qwen3-32B-FP8: a byte per weight of the layers and a float32 per 128 x 128; embedding and head in bfloat16."""
    config, count = PUBLISHED["Qwen3-32B"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"quantization_config": FP8}))
    spec = open_spec(str(path))
    tables, norms = 2 * 151936 * 5120, 64 * (2 * 5120 + 2 * 128) + 5120
    inside = count - tables - norms
    assert weight_bytes(spec, "bfloat16") == 2 * (tables + norms) + inside + inside // 128**2 * 4
    assert ways_to_keep(spec, None, "bfloat16,int8") == {"fp8 bfloat16": ("bfloat16", None)}
    with pytest.raises(ConfigError, match="quantized already"):
        ways_to_keep(spec, "int8", "bfloat16")


def test_llama_3_worked_example() -> None:
    """INVENTORY row 20: 8B in bfloat16 is 16.06 GB; KV per token is 128 KiB, for 70B 320 KiB."""
    small, large = (family_of(c).parse(c) for c in (PUBLISHED[f"Meta-Llama-3-{n}B"][0] for n in (8, 70)))
    assert weight_bytes(small, "bfloat16") == pytest.approx(16.06e9, rel=0.005)
    assert pool_bytes(small, 1, 2, "bfloat16") == 2 * (128 << 10)
    assert pool_bytes(large, 1, 2, "bfloat16") == 2 * (320 << 10)
