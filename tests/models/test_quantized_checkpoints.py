"""Checkpoints that are quantized already: the codes of the files are what is computed with, in every file format.

The oracle is the same checkpoint with the floats that its codes mean (``quantized_files``).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from naive import Naive, greedy
from processes import peak_memory, reset_peak_memory, resident_memory
from quantized_files import KINDS, Kind, make_quantized
from safetensors.torch import load_file, save_file
from tiny_models import SHAPE, Tiny, prompt

from tuili import LLM, SamplingParams, ops
from tuili.base.errors import ConfigError, ModelError
from tuili.layers.decoder import Decoder
from tuili.layers.linear import Matrix
from tuili.layers.shapes import projections
from tuili.layers.sizes import weight_bytes
from tuili.models.checkpoint import open_checkpoint
from tuili.models.weights import load_model, to_hf
from tuili.ops import Kernels, cpu, triton
from tuili.plan.model import open_spec
from tuili.quant import weight as weights
from tuili.quant.scheme import SCHEMES, Scheme

#: Large enough for groups and blocks of 128, whole and partial; fused projections meet inside a block.
WIDE = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
FLOATS = Scheme()
WITH_TRITON = pytest.mark.skipif(not triton.describe().usable, reason=triton.describe().why)
PLACES = ["cpu", pytest.param("triton", marks=WITH_TRITON)]
Made = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="session")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """``made(kind name, case, **shape)``: its two directories, made once."""
    known: dict[str, tuple[Path, Path]] = {}

    def make(name: str, case: str = "llama", **shape: int) -> tuple[Path, Path]:
        key = f"{name} {case} {shape}"
        if key not in known:
            known[key] = make_quantized(tiny(case, **(shape or WIDE)), KINDS[name], tmp_path_factory.mktemp(name))
        return known[key]

    return make


def load(path: Path, dtype: str = "float32", scheme: Scheme | None = FLOATS, kernels: Kernels | None = None) -> Decoder:
    return load_model(open_checkpoint(path), dtype, 256, scheme=scheme, kernels=kernels)


def matrices(model: Decoder) -> dict[str, Matrix]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Matrix)}


def backend(place: str) -> str:
    return place if place == "triton" or cpu.describe().built else "reference"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", KINDS)
def test_codes_are_those_of_the_files(name: str, place: str, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stored matrix means, to the bit, what the files mean; read in slices, also across parts of fused ones."""
    quantized, dense = made(name)
    monkeypatch.setattr(weights, "SLICE", 64 * 128)
    kernels = ops.kernels_of(backend(place))
    have, want = load(quantized, kernels=kernels), load(dense, scheme=None)
    for module, matrix in matrices(have).items():
        assert matrix.stored is not None
        assert torch.equal(matrix.stored.dequant(), matrices(want)[module].weight), module
        rounded = module not in ("embedding", "head")
        assert (matrix.stored.scheme.format != "dense") == rounded
        assert not rounded or matrix.stored.scheme.weight_only == KINDS[name].weight_only


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_table_counts_what_is_stored(name: str, dtype: str, place: str, made: Made) -> None:
    quantized, _ = made(name)
    kernels = ops.kernels_of(backend(place))
    model = load(quantized, dtype, kernels=kernels)
    stored = [matrix.stored for matrix in matrices(model).values() if matrix.stored]
    spec = model.spec
    if any(weight.scheme.wide_scales for weight in stored):
        assert spec.rounded is not None
        wide = tuple((module, replace(scheme, wide_scales=True)) for module, scheme in spec.rounded.schemes)
        spec = replace(spec, rounded=replace(spec.rounded, schemes=wide))
    total = sum(weight.nbytes for weight in stored) + sum(p.nbytes for p in model.parameters())
    assert weight_bytes(spec, dtype, Scheme(), place) == total


#: One for each way in which Triton's kernels are called; the others' codes are compared above.
INTERPRETED = (
    "ct-w4a16-g64-zeros",
    "ct-w8a16-channel",
    "ct-w8a16-g32",
    "ct-int8-zeros",
    "ct-fp8-weight-only",
    "gptq-sym",
)


@pytest.mark.parametrize(
    ("name", "place"),
    [(name, "cpu") for name, kind in KINDS.items() if kind.weight_only]
    + [pytest.param(name, "triton", marks=WITH_TRITON) for name in INTERPRETED],
)
def test_scores_are_those_of_the_floats(name: str, place: str, made: Made) -> None:
    quantized, dense = made(name)
    kernels = ops.kernels_of(backend(place))
    have = Naive(load(quantized, kernels=kernels)).feed(prompt(3))
    want = Naive(load(dense, kernels=kernels)).feed(prompt(3))
    assert float((have - want).abs().max()) <= 1e-3 * float(want.abs().max())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if name.startswith(("ct-w8a8", "ct-w4a8"))])
def test_integer_products_are_exact(name: str, place: str, made: Made) -> None:
    """Activations that are whole numbers up to 127 are their own codes: the product is the integers', scaled once."""
    quantized, dense = made(name)
    kernels = ops.kernels_of(backend(place))
    have, floats = load(quantized, kernels=kernels), matrices(load(dense, scheme=None))
    for module in ("layers.0.attention.qkv_proj", "layers.1.mlp.down_proj"):
        matrix, wide = matrices(have)[module].stored, floats[module].weight.double()
        assert matrix is not None
        x = torch.randint(-127, 128, (3, matrix.into), generator=torch.Generator().manual_seed(1)).float()
        x[:, 0] = 127
        result = matrix.matmul(x)
        if matrix.scheme.format == "int4":  # groups are added in float32
            assert float((result - x.double() @ wide.T).abs().max()) <= 1e-5 * float(wide.abs().max()) * 127
            continue
        scales = matrix.tensors["scales"].view(-1)
        codes = (wide / scales.double().unsqueeze(1)).round()
        assert torch.equal(result, (x.double() @ codes.T).float() * scales)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if "fp8" in name and not kind.weight_only])
def test_fp8_products_round_activations_as_the_scheme_says(name: str, place: str, made: Made) -> None:
    quantized, dense = made(name)
    kernels = ops.kernels_of(backend(place))
    have, floats = load(quantized, kernels=kernels), matrices(load(dense, scheme=None))
    for module in ("layers.0.attention.qkv_proj", "layers.0.attention.o_proj", "layers.1.mlp.down_proj"):
        matrix = matrices(have)[module].stored
        assert matrix is not None
        x = torch.randn(3, matrix.into, generator=torch.Generator().manual_seed(1))
        blocks = x.split(128 if "block" in name else matrix.into, 1)
        steps = [block.abs().amax(1, keepdim=True) / 448 for block in blocks]
        near = [(b / s).to(torch.float8_e4m3fn).float() * s for b, s in zip(blocks, steps, strict=True)]
        want = torch.cat(near, 1).double() @ floats[module].weight.double().T
        assert float((matrix.matmul(x) - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("name", ["ct-w8a8-channel", "ct-w4a16-g64-zeros", "fp8-block", "gptq-8", "awq-g32"])
@pytest.mark.parametrize("case", ["qwen2", "llama-tied", "gemma2", "phi3", "llama-bias"])
def test_families_with_biases_tied_heads_and_fused_files(name: str, case: str, made: Made) -> None:
    quantized, dense = made(name, case)
    have, want = dict(to_hf(load(quantized))), dict(to_hf(load(dense, scheme=None)))
    assert have.keys() == want.keys()
    assert all(torch.equal(have[key], want[key]) for key in want)


@pytest.mark.parametrize("name", ["ct-w4a16-g128", "ct-w8a8-channel", "fp8-block", "gptq-sym", "awq-g128"])
def test_loading_takes_the_weights_and_little_more(name: str, tmp_path: Path) -> None:
    """From mapped files straight into the tensors that are computed with: never a second copy."""
    shape = {**SHAPE, "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24}
    config = {**shape, "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": KINDS[name].config}))
    checkpoint, written, tensors = open_checkpoint(tmp_path), {}, {}
    with torch.device("meta"):
        meta = Decoder(replace(checkpoint.spec, rounded=None))
    for full, tensor in to_hf(meta):
        module, size = full.removesuffix(".weight"), tuple(tensor.shape)
        if module not in checkpoint.layouts:
            tensors[full] = torch.full(size, 0.25, dtype=torch.bfloat16)
            continue
        if size not in written:
            written[size], _ = KINDS[name].write(*size, np.random.default_rng(0))
        tensors |= {f"{module}.{end}": value.clone() for end, value in written[size].items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    del tensors, written
    kernels = ops.kernels_of(backend("cpu"))
    load(tmp_path, "bfloat16", kernels=kernels)  # code is loaded, and the allocator has its arenas
    reset_peak_memory()
    before = resident_memory()
    model = load(tmp_path, "bfloat16", kernels=kernels)
    taken = peak_memory() - before
    size = weight_bytes(checkpoint.spec, "bfloat16", FLOATS)
    assert size <= taken + (8 << 20), "the measurement misses the weights"
    assert taken <= 1.05 * size + (24 << 20)
    assert matrices(model)


# Through the engine ---------------------------------------------------------------------------------------------------

PROMPTS = [prompt(9), prompt(4, seed=2)]


def text(path: Path, count: int = 12, prompts: Sequence[list[int]] = PROMPTS, **options: Any) -> list[list[int]]:
    params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    with LLM(str(path), dtype="float32", max_model_len=64, **options) as llm:
        return [out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)]


SERVED = ("ct-w4a16-g32", "ct-w8a16-channel", "ct-w8a16-g64-zeros", "ct-fp8-weight-only", "awq-g32")


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_engine_serves_them(name: str, kernels: str, made: Made) -> None:
    quantized, dense = made(name)
    assert text(quantized, kernels=kernels) == text(dense, kernels=kernels)


@pytest.mark.skipif(not cpu.describe().built, reason=cpu.describe().why)
@pytest.mark.parametrize("name", [*SERVED, "ct-w8a8-channel", "fp8-block"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_they_leave_dense_keeps_16_bits_beside_float32(name: str, dtype: str, made: Made) -> None:
    """Embedding and head are stored in ``--dtype``; no activation has to be."""
    quantized, _ = made(name)
    with LLM(str(quantized), dtype=dtype, activation_dtype="float32", max_model_len=64) as llm:
        model = llm.engine.client.engine.executor.runner.model
        held = {module: matrix.stored for module, matrix in matrices(model).items() if matrix.stored}
        for module in ("embedding", "head"):
            assert {str(t.dtype) for t in held[module].tensors.values()} == {f"torch.{dtype}"}
        assert model.norm.weight.dtype is torch.float32
        total = sum(weight.nbytes for weight in held.values()) + sum(p.nbytes for p in model.parameters())
        assert weight_bytes(model.spec, "float32", Scheme(dtype=dtype)) == total
        assert llm.generate(PROMPTS, SamplingParams(max_tokens=3, temperature=0.0), use_tqdm=False)


ROUNDED = ("ct-w8a8-channel", "ct-w4a8-g32", "fp8-block", "ct-fp8-tensor")


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_activations_do_not_see_their_batch(name: str, made: Made) -> None:
    """The engine's tokens are the naive loop's on the same stored model."""
    quantized, _ = made(name)
    kernels = ops.kernels_of(backend("cpu"))
    model = load(quantized, kernels=kernels)
    want = [greedy(model, ids, 12, chunk=3) for ids in PROMPTS]
    assert text(quantized) == want


@WITH_TRITON
@pytest.mark.parametrize("name", ["ct-w4a16-g32", "ct-w8a16-g64-zeros", "ct-w8a8-channel", "fp8-block"])
def test_the_engine_serves_them_on_a_device(name: str, made: Made) -> None:
    """Interpreted: the engine's runner for devices, each of a device's packings and ops, against the naive loop."""
    quantized, _ = made(name, num_hidden_layers=1)
    prompts = [prompt(3), prompt(2, seed=2)]
    kernels = ops.kernels_of("triton_invariant")
    model = load(quantized, kernels=kernels)
    want = [greedy(model, ids, 2) for ids in prompts]
    small = {"enforce_eager": True, "max_num_seqs": 2, "max_num_batched_tokens": 16}
    assert text(quantized, 2, prompts, kernels="triton", deterministic=True, **small) == want


@WITH_TRITON
@pytest.mark.parametrize("quantization", [name for name in SCHEMES if name not in ("none", "int4")])
def test_a_device_rounds_while_loading_as_the_cpu_does(quantization: str, tiny: Tiny) -> None:
    """The same matrices and scores."""
    scores = []
    scheme = SCHEMES[quantization]
    for place in ("reference", "triton"):
        kernels = ops.kernels_of(place)
        model = load(tiny("llama"), scheme=scheme, kernels=kernels)
        scores.append((dict(to_hf(model)), Naive(model).feed(prompt(3))))
    (here, near), (there, far) = scores
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert float((near - far).abs().max()) <= 1e-3 * float(near.abs().max())


@WITH_TRITON
def test_int4_on_a_device_is_weight_only_and_says_so(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    scores = []
    kernels = ops.kernels_of("triton")
    with caplog.at_level(logging.INFO, "tuili"):
        for weight_only in (True, False):
            assert "W4A16" not in caplog.text
            model = load(tiny("llama"), scheme=Scheme("int4", 32, weight_only=weight_only), kernels=kernels)
            scores.append(Naive(model).feed(prompt(2)))
    assert torch.equal(*scores)
    assert "on a device activations are not rounded (W4A16)" in caplog.text


# What does not fit ----------------------------------------------------------------------------------------------------


def changed(
    path: Path, to: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor | None] | None = None
) -> Path:
    """A copy of a quantized checkpoint with other settings in its ``quantization_config``, and other tensors."""
    shutil.copytree(path, to)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= settings
    (to / "config.json").write_text(json.dumps(config))
    have: dict[str, torch.Tensor | None] = load_file(path / "model.safetensors") | (tensors or {})
    save_file({k: v for k, v in have.items() if v is not None}, to / "model.safetensors", {"format": "pt"})
    return to


def test_rounding_twice_is_refused(made: Made) -> None:
    for name, method in (("ct-w8a8-channel", "compressed-tensors"), ("gptq-sym", "gptq")):
        with pytest.raises(ConfigError, match=rf"--quantization int4, .* quantized already \({method}\)"):
            LLM(str(made(name)[0]), quantization="int4")
        with pytest.raises(ConfigError, match="quantized already"):
            load(made(name)[0], scheme=Scheme("int8"))


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}


def group(**changes: Any) -> dict[str, Any]:
    weights = GROUP["weights"] | changes.pop("weights", {})  # type: ignore[operator]
    return {"config_groups": {"g": GROUP | {"weights": weights} | changes}}


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("ct-w4a16-g32", {"quant_method": "bitsandbytes"}, "'bitsandbytes'.*Known: awq, compressed-tensors, fp8, gptq"),
        ("ct-w4a16-g32", {"quant_method": None}, "quant_method=None"),
        ("ct-w4a16-g32", {"format": "pack-quantised"}, "Did you mean 'pack-quantized'"),
        ("ct-w4a16-g32", {"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized' is not supported.*int-quantized"),
        ("ct-w4a16-g32", {"config_groups": {}}, r"config_groups=\{\}"),
        ("ct-w4a16-g32", group(weights={"num_bits": 3}), "config_groups.g.weights: integers of 3 bits"),
        ("ct-w4a16-g32", group(weights={"group_size": 48}), "group_size=48 is not supported"),
        ("ct-w4a16-g32", group(weights={"type": "float"}), "floats of 4 bits"),
        ("ct-w4a16-g32", group(weights={"strategy": "token"}), "strategy='token'"),
        ("ct-w4a16-g32", group(weights={"strategy": "block", "block_structure": [64, 64]}), "64 x 64"),
        ("ct-w4a16-g32", group(input_activations={"num_bits": 4, "type": "int"}), "input_activations=.*8 bits"),
        ("ct-w4a16-g32", group(output_activations={"num_bits": 8}), "output_activations="),
        ("ct-w4a16-g32", group(targets=["re:*x"]), "no regular expression"),
        ("ct-w4a16-g32", group(targets="Linear"), "targets='Linear'"),
        ("ct-w4a16-g32", {"ignore": "lm_head"}, "ignore='lm_head'"),
        ("ct-w4a16-g32", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config="),
        ("ct-w4a16-g32", group(targets=["re:.*[qk]_proj"]), "attention.qkv_proj is one matrix here.*v_proj"),
        ("fp8-block", {"weight_block_size": [64, 128]}, r"weight_block_size=\[64, 128\]"),
        ("fp8-block", {"fmt": "e5m2"}, "fmt='e5m2'"),
        ("gptq-sym", {"bits": 3}, "integers of 3 bits"),
        ("gptq-sym", {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        ("gptq-sym", {"group_size": 0}, "group_size=0"),
        ("gptq-v1-g32", {"sym": True}, "sym=true, and zero points"),
        ("awq-g32", {"version": "gemv"}, "version='gemv'"),
        ("awq-g32", {"bits": 8}, "bits=8"),
        ("awq-g32", {"zero_point": False}, "zero_point=False"),
        ("ct-fp8-channel", {"format": "int-quantized"}, None),  # the same tensors by another name
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_supported_is_named(
    name: str, settings: dict[str, Any], says: str | None, made: Made, tmp_path: Path
) -> None:
    path = changed(made(name)[0], tmp_path / "changed", settings)
    if says is None:
        load(path)
        return
    with pytest.raises(ModelError, match=f"(?s){says}"):
        load(path)


@pytest.mark.parametrize(("name", "ending"), [("ct-w4a16-g32", "weight_g_idx"), ("gptq-v1-g32", "g_idx")])
def test_groups_in_order_of_activations_are_refused(name: str, ending: str, made: Made, tmp_path: Path) -> None:
    order = torch.arange(128).int() // 32
    tensor = f"model.layers.0.self_attn.q_proj.{ending}"
    load(changed(made(name)[0], tmp_path / "in-order", {}, {tensor: order}))
    shuffled = changed(made(name)[0], tmp_path / "shuffled", {}, {tensor: order.flip(0)})
    with pytest.raises(ModelError, match=rf"q_proj\.{ending}: groups are in the order of the activations"):
        load(shuffled)


def test_all_that_is_wrong_with_the_tensors_is_in_one_error(made: Made, tmp_path: Path) -> None:
    layer = "model.layers.1."
    path = changed(
        made("ct-w4a16-g32")[0],
        tmp_path / "broken",
        {},
        {
            f"{layer}mlp.up_proj.weight_scale": None,
            f"{layer}self_attn.q_proj.weight_packed": torch.ones(128, 8, dtype=torch.int32),
            "model.embed_tokens.weight_packed": torch.ones(2),
        },
    )
    with pytest.raises(ModelError) as caught:
        load(path)
    message = str(caught.value)
    assert "1 missing: model.layers.1.mlp.up_proj.weight_scale" in message
    assert "1 unexpected: model.embed_tokens.weight_packed" in message
    assert "q_proj.weight_packed (is [128, 8], config.json says [128, 16])" in message
    assert "quantization_config: compressed-tensors" in message


def test_tensors_of_another_type_or_shape_than_they_say(made: Made, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj."
    cases: list[tuple[str, dict[str, torch.Tensor | None], str]] = [
        ("ct-w8a8-channel", {name + "weight": torch.ones(128, 128)}, r"o_proj.weight \(is F32, config.json says I8\)"),
        ("ct-w4a16-g32", {name + "weight_shape": torch.tensor([64, 128])}, r"weight_shape is \[64, 128\]"),
        ("gptq-sym", {name + "bias": torch.ones(128)}, "o_proj.bias is not zero"),
        ("ct-w8a8-channel", {name + "weight_zero_point": torch.ones(128, 1, dtype=torch.int8)}, "says symmetric"),
    ]
    for number, (kind, tensors, says) in enumerate(cases):
        with pytest.raises(ModelError, match=says):
            load(changed(made(kind)[0], tmp_path / str(number), {}, tensors))


@pytest.mark.parametrize(
    ("kind", "end", "dtype"),
    [
        *(("gptq-v1-g32", end, dtype) for end in ("qweight", "qzeros") for dtype in ("float32", "int64", "int16")),
        ("gptq-v1-g32", "scales", "int32"),
        *(("awq-g32", end, "float32") for end in ("qweight", "qzeros")),
        ("awq-g32", "scales", "int32"),
        ("ct-w4a16-g64-zeros", "weight_packed", "float32"),
        ("ct-w4a16-g64-zeros", "weight_zero_point", "int64"),
        ("ct-w4a16-g64-zeros", "weight_scale", "int32"),
        ("ct-w8a8-channel", "weight", "uint8"),
        ("ct-w8a8-channel", "weight_scale", "int8"),
        ("fp8-block", "weight", "float8_e5m2"),
        ("fp8-block", "weight_scale_inv", "int32"),
    ],
)
def test_tensors_of_other_dtypes_are_named(kind: str, end: str, dtype: str, made: Made, tmp_path: Path) -> None:
    name = f"model.layers.0.self_attn.o_proj.{end}"
    tensor = load_file(made(kind)[0] / "model.safetensors")[name]
    path = changed(made(kind)[0], tmp_path / "typed", {}, {name: tensor.to(getattr(torch, dtype))})
    with pytest.raises(ModelError, match=rf"1 of another dtype: {name} \(is \w+, config.json says \w+"):
        load(path)


@pytest.mark.parametrize("code", [-9, 8, 127, -128])
def test_codes_of_more_than_four_bits_are_refused(code: int, made: Made, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj"
    tensor = load_file(made("ct-w4a8-g32")[0] / "model.safetensors")[f"{name}.weight"].clone()
    tensor[5, 7] = code
    with pytest.raises(ModelError, match=rf"{name}: some of its codes are outside of -8..7"):
        load(changed(made("ct-w4a8-g32")[0], tmp_path / "wide", {}, {f"{name}.weight": tensor}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("kind", "end"), [("gptq-sym", "scales"), ("ct-w8a8-channel", "weight_scale")])
def test_scales_that_are_not_finite_are_refused(kind: str, end: str, value: float, made: Made, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj"
    tensor = load_file(made(kind)[0] / "model.safetensors")[f"{name}.{end}"].clone()
    tensor.view(-1)[-1] = value
    with pytest.raises(ModelError, match=f"{name}: some of its scales are NaN or infinite"):
        load(changed(made(kind)[0], tmp_path / "nan", {}, {f"{name}.{end}": tensor}))


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("gptq-sym", {"dynamic": {"+:.*mlp.*": 8}}, "dynamic.*mlp.*=8"),
        ("gptq-sym", {"dynamic": {"+:(((a+)+)+": {}}}, "no regular expression"),
        ("gptq-sym", {"dynamic": []}, r"dynamic=\[\]"),
        ("gptq-sym", {"modules_in_block_to_quantize": 3}, "modules_in_block_to_quantize=3"),
        ("gptq-sym", {"modules_in_block_to_quantize": [[1]]}, "modules_in_block_to_quantize="),
        ("gptq-sym", {"checkpoint_format": ["gptq"]}, "checkpoint_format="),
        ("gptq-sym", {"group_size": 2**40}, "group_size=1099511627776"),
        ("gptq-sym", {"bits": "4"}, "bits='4'"),
        ("awq-g32", {"version": 1}, "version=1"),
        ("fp8-block", {"weight_block_size": ["a", "b"]}, "weight_block_size="),
        ("fp8-block", {"activation_scheme": ["dynamic"]}, "activation_scheme="),
        ("ct-w4a16-g32", {"config_groups": {"g": 4}}, "config_groups: g=4|config_groups.*g=4"),
        ("ct-w4a16-g32", group(weights={"strategy": "block", "block_structure": ["x", 1]}), "block_structure='x'"),
        ("ct-w4a16-g32", group(weights={"strategy": ["group"]}), "strategy="),
        ("ct-w4a16-g32", {"ignore": ["x"] * 30_000}, "ignore has 30000 names"),
        ("ct-w4a16-g32", {"ignore": ["re:" + ".*a" * 300] * 10_000}, "take too long to match"),
        ("ct-w4a16-g32", {"quant_method": ["x"]}, "quant_method="),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_of_other_types_are_named(
    name: str, settings: dict[str, Any], says: str, made: Made, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=f"(?s)quantization_config.*{says}"):
        open_checkpoint(changed(made(name)[0], tmp_path / "changed", settings)).spec  # noqa: B018


def test_what_may_be_there_and_is_not_used(made: Made, tmp_path: Path) -> None:
    """Ranges of the KV cache; zero biases that AutoGPTQ adds; zero zero points."""
    layer = "model.layers.0.self_attn."
    scales: dict[str, torch.Tensor | None] = {f"{layer}{part}_scale": torch.ones(1) for part in "kv"}
    zeros = torch.zeros(128, 1, dtype=torch.int8)
    load(changed(made("fp8-block")[0], tmp_path / "a", {}, scales))
    load(changed(made("gptq-sym")[0], tmp_path / "b", {}, {f"{layer}q_proj.bias": torch.zeros(128)}))
    load(changed(made("ct-w8a8-channel")[0], tmp_path / "c", {}, {f"{layer}q_proj.weight_zero_point": zeros}))


# Which modules --------------------------------------------------------------------------------------------------------


def formats(path: Path) -> dict[str, str]:
    return {module: scheme.format for module, scheme in open_checkpoint(path).spec.rounded.schemes}  # type: ignore[union-attr]


def partly(kind: Kind, kept: tuple[str, ...], settings: dict[str, Any]) -> Kind:
    return replace(kind, kept=kept, config=kind.config | settings)


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        (
            partly(
                KINDS["ct-w4a16-g32"], ("lm_head", "layers.0.mlp"), {"ignore": ["lm_head", "re:.*layers[.]0[.]mlp"]}
            ),
            {"layers.0.mlp.gate_up_proj", "layers.0.mlp.down_proj"},
        ),
        (
            partly(
                KINDS["ct-w4a16-g32"],
                ("lm_head", "layers.1.self_attn.o_proj"),
                {"ignore": ["lm_head", "model.layers.1.self_attn.o_proj"]},
            ),
            {"layers.1.attention.o_proj"},
        ),
        (
            partly(
                KINDS["fp8-block"], ("lm_head", "down_proj"), {"modules_to_not_convert": ["lm_head", "mlp.down_proj"]}
            ),
            {"layers.0.mlp.down_proj", "layers.1.mlp.down_proj"},
        ),
        (
            partly(KINDS["awq-g32"], ("lm_head", "layers.1."), {"modules_to_not_convert": ["model.layers.1"]}),
            {
                f"layers.1.{name}"
                for name in ("attention.qkv_proj", "attention.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
            },
        ),
        (
            partly(KINDS["gptq-sym"], ("lm_head", "o_proj"), {"dynamic": {r"-:.*\.o_proj": {}}}),
            {"layers.0.attention.o_proj", "layers.1.attention.o_proj"},
        ),
        (
            partly(
                KINDS["gptq-sym"],
                ("lm_head", "o_proj", "mlp"),
                {"modules_in_block_to_quantize": [[f"self_attn.{part}_proj" for part in "qkv"]]},
            ),
            {f"layers.{i}.{n}" for i in (0, 1) for n in ("attention.o_proj", "mlp.gate_up_proj", "mlp.down_proj")},
        ),
        (partly(KINDS["gptq-sym"], (), {"lm_head": True}), {"+head"}),
        (partly(KINDS["ct-w8a16-g32"], (), {"ignore": []}), {"+head"}),
    ],
    ids=lambda value: value.name if isinstance(value, Kind) else str(sorted(value))[:30],
)
def test_what_is_left_as_floats(kind: Kind, missing: set[str], tiny: Tiny, tmp_path: Path) -> None:
    quantized, dense = make_quantized(tiny("llama", **WIDE), kind, tmp_path)
    model, want = load(quantized), dict(to_hf(load(dense, scheme=None)))
    every = {module for module in matrices(model) if module not in ("embedding", "head")}
    expected = every - missing | {name[1:] for name in missing if name.startswith("+")}
    assert set(formats(quantized)) == expected
    assert all(torch.equal(tensor, want[name]) for name, tensor in to_hf(model))


@pytest.mark.parametrize(
    ("kind", "entry", "kept"),
    [
        ("fp8-block", "model.layers.*.mlp", ".mlp."),
        ("fp8-block", r"model\.layers\.\d+\.mlp", ".mlp."),
        ("fp8-block", "model.layers.1", "layers.1."),
        ("fp8-block", "o_proj", "o_proj"),
        ("fp8-block", "proj", "proj"),
        ("fp8-block", "re:.*o_proj", "o_proj"),
        ("fp8-block", "(model.layers.0|model.layers.1).mlp", ".mlp."),
        ("awq-g32", "self_att", "self_attn"),
        ("awq-g32", "model.layers.*.mlp", ".mlp."),
    ],
)
def test_what_lists_of_modules_mean(kind: str, entry: str, kept: str, tiny: Tiny, tmp_path: Path) -> None:
    """As transformers and AutoAWQ match them: the floats of what is left out are loaded."""
    changes = {"modules_to_not_convert": ["lm_head", entry]}
    quantized, dense = make_quantized(tiny("llama", **WIDE), partly(KINDS[kind], ("lm_head", kept), changes), tmp_path)
    model, want = load(quantized), dict(to_hf(load(dense, scheme=None)))
    assert all(torch.equal(tensor, want[name]) for name, tensor in to_hf(model))


def test_an_entry_ends_where_a_part_of_the_name_ends(tiny: Tiny, tmp_path: Path) -> None:
    kept = {"modules_to_not_convert": ["model.layers.0.mlp.gate", "lm_hea"]}
    quantized, _ = make_quantized(tiny("llama", **WIDE), partly(KINDS["fp8-block"], ("lm_head",), kept), tmp_path)
    assert "layers.0.mlp.gate_up_proj" in formats(quantized)


@pytest.mark.parametrize(
    ("kind", "algorithm"), [("ct-fp8-tensor", "FP8"), ("ct-fp8-channel", "FP8_PER_CHANNEL_PER_TOKEN")]
)
@pytest.mark.parametrize("beside", [True, False])
def test_modelopt(kind: str, algorithm: str, beside: bool, made: Made, tmp_path: Path) -> None:
    """The same tensors as compressed-tensors writes; the settings in a file of their own, or in config.json."""
    path = tmp_path / "modelopt"
    shutil.copytree(made(kind)[0], path)
    tensors = load_file(path / "model.safetensors")
    ranges = {
        name.removesuffix("weight") + "input_scale": torch.ones(()) for name in tensors if name.endswith("_proj.weight")
    }
    save_file(tensors | ranges, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    settings: dict[str, Any] = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8"}
    if beside:
        del config["quantization_config"]
        written = {"producer": {"name": "modelopt"}, "quantization": settings | {"exclude_modules": ["lm_h*"]}}
        (path / "hf_quant_config.json").write_text(json.dumps(written))
    else:
        config["quantization_config"] = settings | {"ignore": ["lm_head"], "producer": {"name": "modelopt"}}
    (path / "config.json").write_text(json.dumps(config))
    want = dict(to_hf(load(made(kind)[0])))
    assert all(torch.equal(tensor, want[name]) for name, tensor in to_hf(load(path)))
    assert open_spec(str(path)) == open_spec(str(path / "config.json")) == open_checkpoint(path).spec


def test_modelopts_other_formats_are_named(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "nvfp4"
    shutil.copytree(tiny("llama"), path)
    (path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    for reading in (lambda: open_spec(str(path)), lambda: load(path)):
        with pytest.raises(ModelError, match=r"quant_algo='NVFP4' is not supported.*Known: FP8, FP8_PER_CHANNEL"):
            reading()
    (path / "hf_quant_config.json").write_text(json.dumps({"quantization": 8}))
    with pytest.raises(ModelError, match=r"hf_quant_config.json: quantization=8"):
        open_checkpoint(path)


def test_groups_of_modules_with_numbers_of_their_own(tiny: Tiny, tmp_path: Path) -> None:
    """A pattern wins over a class; each group may have its own file format."""
    plain = tiny("llama", **WIDE)
    four, eight = KINDS["ct-w4a16-g32"], KINDS["ct-w8a8-channel"]
    first, _ = make_quantized(plain, four, tmp_path / "four")
    second, _ = make_quantized(plain, eight, tmp_path / "eight")
    tensors = {k: v for k, v in load_file(first / "model.safetensors").items() if ".mlp.down" not in k}
    tensors |= {k: v for k, v in load_file(second / "model.safetensors").items() if ".mlp.down" in k}
    save_file(tensors, first / "model.safetensors", {"format": "pt"})
    config = json.loads((first / "config.json").read_text())
    groups = {
        "a": four.config["config_groups"]["group_0"] | {"format": "pack-quantized"},
        "b": eight.config["config_groups"]["group_0"] | {"targets": ["re:.*down_proj$"], "format": "int-quantized"},
    }
    config["quantization_config"] |= {"config_groups": groups, "format": "mixed-precision"}
    (first / "config.json").write_text(json.dumps(config))
    assert {formats(first)[f"layers.0.{name}"] for name in ("mlp.down_proj", "mlp.gate_up_proj")} == {"int8", "int4"}
    assert Naive(load(first)).feed(prompt(4)).isfinite().all()


def test_settings_in_a_file_of_their_own(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "older"
    shutil.copytree(made("gptq-v1-g32")[0], path)
    config = json.loads((path / "config.json").read_text())
    settings = config.pop("quantization_config")
    (path / "config.json").write_text(json.dumps(config))
    (path / "quantize_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "quant_method"}))
    assert set(formats(path).values()) == {"int4"}
    load(path)


# Scales ---------------------------------------------------------------------------------------------------------------


def test_scales_that_float16_would_change_stay_float32(
    made: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A bfloat16 scale below 2**-17 with bits that float16 has no room for, in one matrix: it alone is stored wide."""
    name = "model.layers.1.self_attn.o_proj.weight_scale"
    quantized, dense = made("ct-w4a16-g32")
    scales = load_file(quantized / "model.safetensors")[name].clone()
    scales[3, 1] = 1.9921875 * 2.0**-24
    path = changed(quantized, tmp_path / "tiny", {}, {name: scales})
    with caplog.at_level(logging.WARNING, "tuili"):
        have = matrices(load(path))
    wide = {module for module, matrix in have.items() if matrix.stored and matrix.stored.scheme.wide_scales}
    assert wide == {"layers.1.attention.o_proj"}
    assert "layers.1.attention.o_proj.weight: scales (down to 1.2e-07) would not be the same in float16" in caplog.text
    assert "on torch's references" in caplog.text
    stored, floats = have["layers.1.attention.o_proj"].stored, load_file(dense / "model.safetensors")
    assert stored is not None
    before = floats[name.removesuffix("_scale")]
    after, group = stored.dequant(), slice(32, 64)
    assert torch.equal(after[:3], before[:3])
    codes = (before[3, group] / load_file(quantized / "model.safetensors")[name][3, 1].float()).round()
    assert torch.equal(after[3, group], codes * scales[3, 1].float())
    for backend in ("cpu", "triton") if cpu.describe().built and triton.describe().usable else ():
        kernels = ops.kernels_of(backend)
        again = matrices(load(path, kernels=kernels))["layers.1.attention.o_proj"].stored
        assert again is not None
        x = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(again.matmul(x), x @ after.T, rtol=1e-4, atol=1e-4)


def test_parts_of_a_fused_matrix_are_where_layers_have_them(tiny: Tiny) -> None:
    for case in ("llama", "gemma2", "phi3", "mistral-full"):
        model = load(tiny(case), scheme=None)
        block = model.layers[0]
        shapes = projections(model.spec)
        assert shapes["attention.qkv_proj"].parts == block.attention.qkv_proj.parts
        assert shapes["mlp.gate_up_proj"].parts == block.mlp.gate_up_proj.parts
