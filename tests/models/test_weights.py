"""Reading and writing weights: the error that lists everything, files that are not whole, tied heads, the way back."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from naive import Naive
from safetensors.torch import load_file, save_file
from tiny_models import CASES, Tiny, prompt, reference_logits

from tuili.base.errors import ConfigError, ModelError
from tuili.layers.decoder import Decoder
from tuili.layers.sizes import parameter_count
from tuili.models.checkpoint import open_checkpoint
from tuili.models.names import EMBEDDING, HEAD
from tuili.models.weights import load_model, to_hf
from tuili.quant.scheme import SCHEMES


def load(path: Path, dtype: str = "float32") -> Decoder:
    return load_model(open_checkpoint(path), dtype, 256)


def changed(path: Path, to: Path, change: dict[str, torch.Tensor | None], settings: dict | None = None) -> Path:
    """A copy of the checkpoint ``path`` with tensors replaced, added or (None) taken out."""
    shutil.copytree(path, to)
    tensors = load_file(path / "model.safetensors") | change
    save_file({k: v for k, v in tensors.items() if v is not None}, to / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text()) | (settings or {})
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize("case", CASES)
def test_to_hf_is_the_way_back(case: str, tiny: Tiny) -> None:
    """What was loaded comes out under the same names with the same values: fused weights are cut again."""
    stored = load_file(tiny(case) / "model.safetensors")
    written = dict(to_hf(load(tiny(case))))
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], stored[name]) for name in stored)


def test_all_that_is_wrong_is_in_one_error(tiny: Tiny, tmp_path: Path) -> None:
    layer = "model.layers.1."
    broken = changed(
        tiny("llama"),
        tmp_path / "broken",
        {
            layer + "mlp.up_proj.weight": None,
            "model.norm.weight": None,
            layer + "self_attn.q_norm.weight": torch.ones(16),
            "extra.weight": torch.ones(3),
            layer + "self_attn.k_proj.weight": torch.ones(64, 64),
            "lm_head.weight": torch.ones(319, 64),
        },
    )
    with pytest.raises(ModelError) as caught:
        load(broken)
    message = str(caught.value)
    assert "2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight" in message
    assert "2 unexpected: extra.weight, model.layers.1.self_attn.q_norm.weight" in message
    assert "2 misshapen: lm_head.weight (is [319, 64], config.json says [320, 64])" in message
    assert "model.layers.1.self_attn.k_proj.weight (is [64, 64], config.json says [32, 64])" in message
    assert str(broken) in message


@pytest.mark.parametrize("names", [("embedding",), ("head",), ("embedding", "head")], ids=str)
def test_a_tied_pair_may_have_either_name_or_both(names: tuple[str, ...], tiny: Tiny, tmp_path: Path) -> None:
    plain = tiny("llama-tied")
    table = load_file(plain / "model.safetensors")[f"{EMBEDDING}.weight"]
    both = {f"{EMBEDDING}.weight": "embedding" in names, f"{HEAD}.weight": "head" in names}
    path = changed(plain, tmp_path / "tied", {name: table.clone() if there else None for name, there in both.items()})
    assert open_checkpoint(path).spec.tied
    assert torch.equal(Naive(load(path)).feed(prompt(9)), Naive(load(plain)).feed(prompt(9)))


@pytest.mark.parametrize("case", ["llama-tied", "gemma3"])
@pytest.mark.parametrize("row", [0, 319, slice(None)], ids=str)
def test_a_head_that_is_not_the_embedding_scores(
    case: str, row: int | slice, tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in transformers: whatever config.json says, what is stored is used; the planner counts it too."""
    head = load_file(tiny(case) / "model.safetensors")[f"{EMBEDDING}.weight"].clone()
    head[row] += torch.randn(head[row].shape, generator=torch.Generator().manual_seed(0)) * head.std()
    path = changed(tiny(case), tmp_path / "other", {f"{HEAD}.weight": head})
    said = changed(path, tmp_path / "said", {}, {"tie_word_embeddings": False})
    with caplog.at_level("WARNING", "tuili"):
        spec = open_checkpoint(path).spec
    assert "tie_word_embeddings" in caplog.text
    assert parameter_count(spec) == parameter_count(open_checkpoint(said).spec)
    assert torch.equal(Naive(load(path)).feed(prompt(9)), Naive(load(said)).feed(prompt(9)))
    assert (Naive(load(path)).feed(prompt(9)) - reference_logits(path, prompt(9))).abs().max() <= 1e-4


def test_a_head_in_another_file_or_of_other_tensors(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "sharded"
    shutil.copytree(tiny("llama-tied", shard="100KB"), path)
    (path / "model.safetensors.index.json").unlink()
    table = load_file(tiny("llama-tied") / "model.safetensors")[f"{EMBEDDING}.weight"]
    save_file({f"{HEAD}.weight": table}, path / "head.safetensors")
    assert open_checkpoint(path).spec.tied
    save_file({f"{HEAD}.weight": table.half()}, path / "head.safetensors")
    assert not open_checkpoint(path).spec.tied
    save_file({f"{HEAD}.bias": torch.ones(320)}, path / "head.safetensors")
    with pytest.raises(ModelError, match=r"missing: lm_head.weight.*unexpected: lm_head.bias"):
        load(path)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "bool", "complex64", "float8_e4m3fn", "float8_e5m2", "int32"])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight", f"{EMBEDDING}.weight"])
def test_weights_that_are_no_floats_are_named(dtype: str, name: str, tiny: Tiny, tmp_path: Path) -> None:
    tensor = load_file(tiny("llama") / "model.safetensors")[name]
    path = changed(tiny("llama"), tmp_path / "odd", {name: (tensor * 20).to(getattr(torch, dtype))})
    with pytest.raises(ModelError, match=rf"1 of another dtype: {name} \(is \w+, .*quantization_config\?"):
        load(path)


def test_weights_in_double_precision_are_cast(tiny: Tiny, tmp_path: Path) -> None:
    double = {name: tensor.double() for name, tensor in load_file(tiny("llama") / "model.safetensors").items()}
    path = changed(tiny("llama"), tmp_path / "double", dict(double))
    assert torch.equal(Naive(load(path)).feed(prompt(9)), Naive(load(tiny("llama"))).feed(prompt(9)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8_weight_only"])
def test_weights_that_are_not_finite_are_not_rounded(
    value: float, quantization: str, tiny: Tiny, tmp_path: Path
) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    tensor = load_file(tiny("llama") / "model.safetensors")[name].clone()
    tensor[95, 63] = value
    path = changed(tiny("llama"), tmp_path / "nan", {name: tensor})
    with pytest.raises(ModelError, match=rf"{name} has weights that are NaN or infinite"):
        load_model(open_checkpoint(path), "float32", 256, scheme=SCHEMES[quantization])
    load(path)  # as it is


def test_only_regular_files_of_weights_are_opened(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    shutil.copytree(tiny("llama"), path)
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")
    with pytest.raises(ModelError, match=r"has no \*.safetensors"):
        load(path)
    open_checkpoint(path).spec  # noqa: B018 (it must not wait)


def test_buffers_of_old_checkpoints_are_no_parameters(tiny: Tiny, tmp_path: Path) -> None:
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(3)}
    load(changed(tiny("llama"), tmp_path / "old", dict(buffers)))


@pytest.mark.parametrize("layout", ["language_model.model.", "model.language_model."])
def test_text_part_of_multimodal_gemma(layout: str, tiny: Tiny, tmp_path: Path) -> None:
    plain = tiny("gemma3")
    stored = load_file(plain / "model.safetensors")
    renamed = {layout + name.removeprefix("model."): tensor for name, tensor in stored.items()}
    vision = {"vision_tower.vision_model.head.weight": torch.ones(2), "multi_modal_projector.w": torch.ones(2)}
    path = tmp_path / "multimodal"
    shutil.copytree(plain, path)
    save_file(renamed | vision, path / "model.safetensors", {"format": "pt"})
    text = json.loads((plain / "config.json").read_text())
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106], "text_config": text}
    (path / "config.json").write_text(json.dumps(outer))
    assert open_checkpoint(path).spec.eos_token_ids == (258,)  # generation_config.json has the last word
    (path / "generation_config.json").unlink()
    assert open_checkpoint(path).spec.eos_token_ids == (1, 106)
    assert (Naive(load(path)).feed(prompt(40)) - reference_logits(plain, prompt(40))).abs().max() <= 1e-4


def test_bare_set_of_files_and_consolidated(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "bare"
    shutil.copytree(tiny("llama", shard="100KB"), path)
    (path / "model.safetensors.index.json").unlink()
    save_file({"tok_embeddings.weight": torch.ones(2)}, path / "consolidated.safetensors")
    load(path)


def test_a_tensor_in_two_files(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "twice"
    shutil.copytree(tiny("llama"), path)
    (path / "model.safetensors").rename(path / "a.safetensors")
    shutil.copy(path / "a.safetensors", path / "b.safetensors")
    with pytest.raises(ModelError, match="there twice"):
        load(path)


def test_pickles_are_never_loaded(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "pickled"
    shutil.copytree(tiny("llama"), path)
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no \*.safetensors"):
        load(path)
    torch.save({}, path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model.bin.*never does.*save_pretrained"):
        load(path)


@pytest.mark.parametrize("size", [0, 5, 2000, 100_000])
def test_truncated_file(size: int, tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "truncated"
    shutil.copytree(tiny("llama"), path)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:size])
    with pytest.raises(ModelError, match=r"model.safetensors is not a whole safetensors file.*again"):
        load(path)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ('{"weight_map": {"a": "gone.safetensors"}}', "lacks 1 of 1 weight files; fetch gone.safetensors"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "outside its directory"),
        ('{"weight_map": {"a": "' + "x" * 5000 + '"}}', "outside its directory"),
        ('{"weight_map": {"a": "x\\u0000y"}}', "lacks 1 of 1"),
        ('{"weight_map": ' + "[" * 100_000 + "]" * 100_000 + "}", "cannot be read as JSON"),
        ('{"weight_map": ["a"]}', "weight_map="),
        ("{", "cannot be read as JSON"),
    ],
)
def test_wrong_index(index: str, says: str, tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "indexed"
    shutil.copytree(tiny("llama"), path)
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=says):
        load(path)


def test_progress_counts_to_the_end(tiny: Tiny) -> None:
    calls: list[tuple[str, int, int]] = []
    model = load_model(
        open_checkpoint(tiny("qwen2")), "bfloat16", 64, lambda name, done, total: calls.append((name, done, total))
    )
    size = sum(p.numel() * 2 for p in model.parameters())
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert calls[-1][1:] == (size, size)
    assert "layers.0.attention.qkv_proj.bias" in [name for name, _, _ in calls]
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_dtype_and_quantization_are_checked(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown dtype 'float'"):
        load(tiny("llama"), "float")
    quantized = changed(tiny("llama"), tmp_path / "fp8", {}, {"quantization_config": {"quant_method": "fp9"}})
    with pytest.raises(ModelError, match=r"quant_method=.fp9.*Known: awq, compressed-tensors, fp8, gptq"):
        load(quantized)
