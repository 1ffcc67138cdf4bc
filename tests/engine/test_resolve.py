"""Laws of resolve: pure, idempotent, reproducible; what does not fit is refused with numbers that do."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tuili.base.config import Config, dump, load, options
from tuili.base.errors import ConfigError
from tuili.base.hardware import Hardware
from tuili.engine.captures import capture_sizes
from tuili.engine.memory import Measured, memory_of, memory_table
from tuili.engine.resolve import effective, resolve
from tuili.layers.sizes import kv_bytes_per_position
from tuili.layers.spec import ModelSpec, RopeSpec, Rounded
from tuili.quant.scheme import SCHEMES

GIB = 2**30
SPEC = ModelSpec("llama", 32_000, 512, 1024, 8, 8, 4, 64, 4096, RopeSpec(64), dtype="bfloat16")


def machine(available: int = 16 * GIB, isa: tuple[str, ...] = ("avx2", "amx_bf16"), **more) -> Hardware:
    return Hardware("test cpu", 4, frozenset(isa), 2 * available, available, **more)


def run(hardware: Hardware | None = None, spec: ModelSpec = SPEC, **options) -> Config:
    return resolve(Config(**options), spec, hardware or machine())


def test_everything_that_shapes_the_run_has_a_value():
    config = run(model="m")
    assert effective(config) == {
        "model": "m",
        "device": "cpu",
        "dtype": "bfloat16",
        "activation_dtype": "bfloat16",
        "quantization": "none",
        "threads": 4,
        "max_model_len": 4096,
        "max_num_seqs": 128,
        "max_num_batched_tokens": 2048,
        "kv_tokens": 128 * 4096,
    }
    assert config.served_model_name == "m"
    assert config.kv_cache_memory_bytes == 128 * 4096 * kv_bytes_per_position(SPEC, config.kv_cache_dtype)


FLOATS = ["auto", "float32", "bfloat16", "float16"]
settings_drawn = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(FLOATS),
        "max_model_len": st.integers(1, 4096),
        "max_num_seqs": st.integers(1, 300),
        "max_num_batched_tokens": st.integers(1, 5000),
        "block_size": st.integers(1, 64),
        "num_gpu_blocks_override": st.integers(1, 10_000),
        "kv_cache_memory_bytes": st.integers(1, 8 * GIB),
        "gpu_memory_utilization": st.floats(0.05, 1.0),
        "enable_chunked_prefill": st.booleans(),
        "threads": st.integers(1, 64),
        "quantization": st.sampled_from(list(SCHEMES)),
        "quantization_group_size": st.sampled_from([32, 64, 128]),
        "kv_cache_dtype": st.sampled_from(["auto", "int8", "fp8"]),
        "max_cudagraph_capture_size": st.integers(1, 600),
        "enforce_eager": st.booleans(),
        "deterministic": st.booleans(),
        "device": st.sampled_from(["auto", "cpu", "cuda"]),
    },
)


@given(given=settings_drawn, memory=st.integers(200 << 20, 64 * GIB), fast=st.booleans(), on_card=st.booleans())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_resolved_again_or_from_its_file_it_is_the_same(given, memory, fast, on_card, tmp_path_factory):
    hardware = card(memory) if on_card else machine(memory, ("amx_bf16",) if fast else ())
    try:
        once = run(hardware, **given)
    except ConfigError:
        assume(False)
    assert resolve(once, SPEC, hardware) == once
    path = (
        tmp_path_factory.getbasetemp() / "resolved.toml"
    )  # of the session: a folder of its own costs more than the rest
    path.write_text(dump(once))
    assert load(path, {}) == once
    for name, value in given.items():
        if value != "auto" and name not in ("kv_cache_memory_bytes",):
            assert getattr(once, name) == value, f"{name} was changed"
    assert once.num_gpu_blocks_override * once.block_size >= once.max_model_len
    assert once.max_num_seqs <= once.max_num_batched_tokens


GPTQ = Rounded("gptq", (("layers.0.mlp.up", SCHEMES["int4_weight_only"]),))


@pytest.mark.parametrize("rounded", [None, GPTQ], ids=["floats", "gptq"])
@pytest.mark.parametrize("stored", FLOATS[1:])
@pytest.mark.parametrize("isa", [("avx2",), ("avx512_bf16",)], ids=["avx2", "avx512_bf16"])
@pytest.mark.parametrize("hardware", ["cpu", "card"])
def test_every_combination_of_dtypes_is_resolved_once(stored, isa, rounded, hardware):
    """Whatever goes together once goes together again, and what was asked for stays."""
    spec = ModelSpec("llama", 100, 8, 8, 1, 1, 1, 8, 64, RopeSpec(8), dtype=stored, rounded=rounded)
    place, found = machine(isa=isa) if hardware == "cpu" else replace(card(), isa=frozenset(isa)), 0
    quantizations = ["none"] if rounded else ["none", "int8", "int4_weight_only"]
    kinds = FLOATS, FLOATS, [*FLOATS, "int8", "fp8"], ["auto", "reference"], quantizations
    for values in product(*kinds):
        given = dict(
            zip(("dtype", "activation_dtype", "kv_cache_dtype", "kernels", "quantization"), values, strict=True)
        )
        try:
            once = run(place, spec, **given)
        except ConfigError:
            assert given["activation_dtype"] != "auto" or given["kv_cache_dtype"] in FLOATS[1:], given
            continue
        found += 1
        assert resolve(once, spec, place) == once, given
        assert all(getattr(once, name) == value for name, value in given.items() if value != "auto")
        assert "auto" not in (once.dtype, once.activation_dtype, once.kv_cache_dtype)
    assert found > 100 // (3 if rounded else 1)


@pytest.mark.parametrize(
    ("stored", "isa", "given", "activations", "kv"),
    [
        ("float32", "amx_bf16", {}, "float32", "float32"),
        ("bfloat16", "amx_bf16", {}, "bfloat16", "bfloat16"),
        ("bfloat16", "avx512_bf16", {}, "bfloat16", "bfloat16"),
        ("bfloat16", "avx2", {}, "float32", "bfloat16"),
        ("float16", "avx2", {}, "float32", "float32"),
        ("float16", "amx_bf16", {}, "float32", "float32"),
        ("bfloat16", "avx2", {"activation_dtype": "bfloat16"}, "bfloat16", "bfloat16"),
        ("bfloat16", "amx_bf16", {"activation_dtype": "float32"}, "float32", "bfloat16"),
        ("bfloat16", "avx2", {"kv_cache_dtype": "float32"}, "float32", "float32"),
        ("bfloat16", "avx2", {"kernels": "reference"}, "bfloat16", "bfloat16"),
        ("float16", "avx2", {"kernels": "reference"}, "float16", "float16"),
    ],
)
def test_weights_keep_their_dtype_and_activations_are_what_is_fast(stored, isa, given, activations, kv):
    spec = ModelSpec("llama", 100, 8, 8, 1, 1, 1, 8, 64, RopeSpec(8), dtype=stored)
    config = run(machine(isa=(isa,)), spec, **given)
    assert (config.dtype, config.activation_dtype, config.kv_cache_dtype) == (stored, activations, kv)


@pytest.mark.parametrize("isa", ["avx2", "avx512_bf16"])
@pytest.mark.parametrize("rounds", ["the engine", "the checkpoint"])
def test_beside_rounded_weights_float16_is_multiplied_by_pairs_where_there_are_some(isa, rounds):
    spec = ModelSpec("llama", 100, 8, 8, 1, 1, 1, 8, 64, RopeSpec(8), dtype="float16")
    if rounds == "the checkpoint":
        config = run(machine(isa=(isa,)), replace(spec, rounded=GPTQ))
    else:
        config = run(machine(isa=(isa,)), spec, quantization="int8")
    expected = ("bfloat16", "bfloat16") if isa == "avx512_bf16" else ("float16", "float32")
    assert (config.dtype, config.activation_dtype) == expected


@pytest.mark.parametrize(
    ("hardware", "given", "said"),
    [
        (
            "cpu",
            {"activation_dtype": "float16"},
            "weights in bfloat16 (--dtype): activations are in the weights' type or",
        ),
        ("card", {"activation_dtype": "float32"}, "use --activation-dtype bfloat16"),
        ("cpu", {"kv_cache_dtype": "float16"}, "K and V are kept in bfloat16, int8 or fp8"),
        ("cpu", {"dtype": "float32", "kv_cache_dtype": "bfloat16"}, "K and V are kept in float32, int8 or fp8"),
    ],
)
def test_dtypes_that_do_not_go_together(hardware, given, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        run(card() if hardware == "card" else None, **given)


def card(memory: int = 100 * GIB, free: int | None = None) -> Hardware:
    return machine(gpu="H200", gpu_memory=memory, gpu_free=memory if free is None else free)


def test_a_gpu_is_used_where_there_is_one():
    config = run(card())
    assert (config.device, config.max_num_seqs, config.max_num_batched_tokens) == ("cuda", 256, 8192)
    with pytest.raises(ConfigError, match="no CUDA device"):
        run(device="cuda")


def test_captured_sizes_are_vllms():
    """https://docs.vllm.ai/en/latest/api/vllm/config/compilation: cudagraph_capture_sizes."""
    by_eights = [1, 2, 4, *range(8, 256, 8)]
    assert list(capture_sizes(run(card(), max_num_seqs=256))) == [*by_eights, 256]
    assert list(capture_sizes(run(card(), max_num_seqs=512))) == [*by_eights, *range(256, 513, 16)]
    assert run(card(), max_num_seqs=2000).max_cudagraph_capture_size == 512


@given(rows=st.integers(1, 1200), largest=st.none() | st.integers(1, 1200))
@settings(max_examples=100, deadline=None)
def test_every_step_up_to_the_largest_captured_one_fits_a_size(rows, largest):
    config = run(card(), max_num_seqs=rows, max_cudagraph_capture_size=largest)
    sizes = capture_sizes(config)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == min(rows, largest or 512)
    assert all(
        after - before <= max(1, 16 if after >= 256 else 8 if after > 4 else 2) for before, after in pairwise(sizes)
    )


def test_what_captures_nothing_takes_no_captured_sizes():
    for hardware, how in ((card(), {"enforce_eager": True}), (machine(), {}), (card(), {"kernels": "reference"})):
        config = run(hardware, **how)
        assert (config.max_cudagraph_capture_size, capture_sizes(config)) == (None, ())
        with pytest.raises(ConfigError, match="--max-cudagraph-capture-size 8 has no effect"):
            run(hardware, max_cudagraph_capture_size=8, **how)
    assert capture_sizes(run(kernels="triton", max_num_seqs=4)) == (1, 2, 4), "interpreted, they are tested on a CPU"


def test_a_card_is_shared_and_its_memory_has_vllms_meaning():
    """The share is of all memory (as vLLM's), and no more is used than is free."""
    half = run(card(), gpu_memory_utilization=0.5, max_model_len=64, max_num_seqs=1)
    assert half.num_gpu_blocks_override == 4, "no more than the rows can need"
    small = card(2 * GIB)
    whole, shared = (run(h, max_num_seqs=64).num_gpu_blocks_override for h in (small, card(2 * GIB, free=GIB)))
    table = memory_of(run(small, max_num_seqs=64), SPEC, small)
    assert whole == table.for_kv // table.block - 1, "a device has a block for padding"
    assert shared < whole
    with pytest.raises(ConfigError, match="CUDA context"):
        run(card(2 * GIB, free=GIB // 8))
    tight = run(card(2 * GIB, free=GIB // 2))
    assert tight.num_gpu_blocks_override * 16 == 4096, (
        "not refused for an estimate: one request fits beside the weights"
    )


def test_what_was_measured_replaces_the_estimate():
    hardware = card(4 * GIB)
    measured = Measured(weights=GIB, activations=GIB // 2, graphs=GIB // 8, context=GIB // 4)
    config = resolve(Config(), SPEC, hardware, measured)
    memory = memory_of(config, SPEC, hardware, measured)
    assert memory.for_kv == int(4 * GIB * 0.9) - GIB - GIB // 2 - GIB // 8 - GIB // 4
    assert config.num_gpu_blocks_override == memory.for_kv // memory.block - 1
    assert resolve(config, SPEC, hardware) == config, "resolved, it does not ask again"
    lean = resolve(Config(gpu_memory_utilization=1.0), SPEC, hardware, Measured(GIB, 0, 0, 0))
    assert resolve(lean, SPEC, hardware) == lean, "what was measured to fit is not estimated to be too much"
    text = memory_table(memory, config.num_gpu_blocks_override)
    for word in ("weights", "activations", "captured steps", "CUDA context", "KV cache", "free", "as measured"):
        assert word in text


def test_deterministic_and_compile_do_not_go_together():
    assert run(deterministic=True).deterministic
    with pytest.raises(ConfigError, match="use one of them"):
        run(deterministic=True, compile=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_model_len": 5000}, "4096"),
        ({"max_num_seqs": 100, "max_num_batched_tokens": 50}, "--max-num-seqs 50"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 4000}, "4096"),
        ({"num_gpu_blocks_override": 10}, "--max-model-len 160"),
        ({"kv_cache_memory_bytes": 1}, "--kv-cache-memory-bytes"),
        ({"num_gpu_blocks_override": 10**7}, "more memory than there is"),
        ({"quantization": "int8", "quantization_group_size": 64}, "int4"),
        ({"quantization": "int4", "quantization_group_size": 48}, "32, 64, 128"),
    ],
)
def test_contradictions_say_what_would_work(given, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        run(**given)


def test_budgets_adapt_to_each_other():
    assert run(max_num_seqs=3000).max_num_batched_tokens == 3000
    assert run(max_num_batched_tokens=50).max_num_seqs == 50
    assert run(enable_chunked_prefill=False).max_num_batched_tokens == 4096


@pytest.mark.parametrize("name", SCHEMES)
def test_quantization_is_resolved(name):
    config = run(quantization=name)
    assert config.quantization_group_size == (32 if "int4" in name else None)
    with pytest.raises(ConfigError, match="int4_weight_only"):
        Config(quantization="int44")
    choices = next(o.metadata["choices"] for o in options("model") if o.name == "quantization")
    assert set(choices) == set(SCHEMES)


def test_a_model_that_is_too_large_is_offered_smaller_weights():
    large = replace(SPEC, hidden_size=4096, intermediate_size=14336, num_layers=32)
    with pytest.raises(ConfigError, match="--quantization int8"):
        run(machine(7 * GIB), large)
    with pytest.raises(ConfigError, match="--quantization int4 "):
        run(machine(5 * GIB), large)
    assert run(machine(5 * GIB), large, quantization="int4").num_gpu_blocks_override


@pytest.mark.parametrize("memory", [230, 250, 290, 300])
def test_the_table_and_its_remedies(memory):
    """Every setting that the error proposes does fit."""
    hardware = machine(memory << 20)
    settings_given = {"max_num_batched_tokens": 512, "max_num_seqs": 16, "dtype": "float32"}
    with pytest.raises(ConfigError) as raised:
        run(hardware, **settings_given)
    text = str(raised.value)
    for word in ("weights", "KV per 1k tokens", "activations", "available", "left for KV"):
        assert word in text
    proposed = re.findall(r"^  --([a-z-]+) (\S+)", text.split("What would fit:")[1], re.MULTILINE)
    assert proposed or "a machine with" in text
    for flag, value in proposed:
        kind = {"dtype": str, "quantization": str, "gpu-memory-utilization": float}.get(flag, int)
        run(hardware, **{**settings_given, flag.replace("-", "_"): kind(value)})


def test_an_unknown_policy_is_told_before_the_model_is_looked_for(tmp_path: Path) -> None:
    from tuili.engine.build import build

    with pytest.raises(ConfigError, match=r"'fcfz'.*Did you mean 'fcfs'"):
        build(Config(model=str(tmp_path), scheduling_policy="fcfz"))
