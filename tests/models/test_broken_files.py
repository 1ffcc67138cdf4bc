"""Half-edited and hostile files: whatever stands under whatever key, a checkpoint opens or a ModelError says why."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from quantized_files import KINDS

from tuili.base.config import Config
from tuili.base.errors import ConfigError, ModelError
from tuili.engine.generation_config import generation_defaults
from tuili.engine.tokenizer import Tokenizer
from tuili.layers.sizes import parameter_count
from tuili.models.checkpoint import open_checkpoint
from tuili.models.quantized import spec_of

ODD: list[Any] = [
    *(None, True, 0, -1, 7, 10**9, 10**30, 1.5, 1e-300, 1e300, float("inf"), float("nan")),
    *("", "x", "4", "re:(a+)+b", [], [[]], [1], ["x"], [None], ["a", "b"], {}, {"x": 1}, {"x": {}}, {"x": [{}]}),
    *([["full_attention"]] * 4, {"full_attention": {}}, {"sliding_attention": {"rope_theta": 7}}),
]
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "mscale": 1.0, "beta_fast": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
WHOLE: dict[str, dict[str, Any]] = {
    "Llama": {"rope_theta": 1e4, "rope_scaling": YARN, "hidden_act": "silu", "torch_dtype": "float16", "head_dim": 16},
    "Llama, new": {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "dtype": "bfloat16", "eos_token_id": [1, 2]},
    "Mistral": {"sliding_window": 8, "rms_norm_eps": 1e-5, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "tie_word_embeddings": True},
    "Qwen3": {"layer_types": ["full_attention"] * 4, "attention_bias": False, "rope_parameters": {"rope_theta": 1e6}},
    "Phi3": {"rope_scaling": LONG, "original_max_position_embeddings": 64, "partial_rotary_factor": 1.0},
    "Gemma2": {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0, "hidden_activation": "gelu", "head_dim": 16},
    "Gemma3": {
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {}},
        "rope_local_base_freq": 1e4,
        "sliding_window_pattern": 2,
        "head_dim": 16,
    },
}
WHOLE |= {
    kind: {"quantization_config": KINDS[kind].config}
    for kind in ("ct-w4a16-g32", "gptq-v1-g32", "awq-g32", "fp8-block")
}
WHOLE["modelopt"] = {"quantization_config": {"quant_algo": "FP8", "ignore": ["lm_head"]}}
WHOLE["gptq, dynamic"] = {
    "quantization_config": KINDS["gptq-v1-g32"].config
    | {"dynamic": {"+:.*mlp": {"bits": 8}}, "modules_in_block_to_quantize": [["mlp.gate_proj", "mlp.up_proj"]]}
}


def whole(name: str) -> dict[str, Any]:
    architecture = name.split(",")[0] if name[0].isupper() else "Llama"
    return {**SIZES, "architectures": [f"{architecture}ForCausalLM"], **WHOLE[name]}


def changed(value: Any) -> Iterator[tuple[str, Any]]:
    """``value`` with one of its parts, at any depth, replaced by each odd value: what was changed, and the result."""
    parts: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        for path, other in [*((f"={odd!r:.40}", odd) for odd in ODD), *changed(part)]:
            copy = value.copy()
            copy[key] = other
            yield f".{key}{path}", copy


@pytest.mark.parametrize("name", WHOLE)
def test_odd_values_in_config_json(name: str) -> None:
    config = whole(name)
    assert parameter_count(spec_of(config)) > 0, "the config itself is fine"
    held = tried = 0
    for what, odd in changed(config):
        tried += 1
        try:
            parameter_count(spec_of(odd))
            held += 1
        except ModelError as error:
            held += len(str(error)) < 2000
        except Exception as error:
            raise AssertionError(f"config.json{what}: {type(error).__name__}: {error}") from error
    assert held == tried, "some message is too long"


@pytest.mark.parametrize("name", WHOLE)
def test_ropes_that_are_accepted_can_be_made(name: str) -> None:
    """What parsing lets through must not end in a traceback, or in NaN, where the tables are made."""
    from tuili.layers.rope import Rope

    config = whole(name)
    for key in config.keys() & {"rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor", "head_dim"}:
        for what, odd in changed({key: config[key]}):
            try:
                spec = spec_of(config | odd)
            except ModelError:
                continue
            for each in (spec.rope, spec.window_rope):
                if each is not None and each.dim <= 64:
                    rope = Rope(each, 8)
                    assert bool(rope.cos.isfinite().all()), what


TOKENIZER = {
    "add_bos_token": True,
    "bos_token": {"content": "a", "lstrip": False},
    "eos_token": "b",
    "extra_special_tokens": {"think_token": "c"},
    "additional_special_tokens": ["d", {"content": "e"}],
    "added_tokens_decoder": {"6": {"content": "<x>", "special": True, "normalized": False}},
    "tokenizer_class": "Qwen2Tokenizer",
    "add_prefix_space": False,
}
BESIDE = {
    "tokenizer_config.json": TOKENIZER,
    "added_tokens.json": {"<x>": 6},
    "special_tokens_map.json": {"pad_token": "a", "unk_token": {"content": "b"}},
    "vocab.json": {letter: i for i, letter in enumerate("abcdef")},
}


@pytest.mark.parametrize("file", BESIDE)
def test_odd_values_in_the_files_of_a_tokenizer(file: str, tmp_path: Path) -> None:
    for name, content in BESIDE.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert Tokenizer.open(tmp_path).encode("a<x>", False) == [0, 6]
    for what, odd in changed(BESIDE[file]):
        (tmp_path / file).write_text(json.dumps(odd))
        try:
            Tokenizer.open(tmp_path).special_ids  # noqa: B018
        except ModelError:
            continue
        except BaseException as error:
            raise AssertionError(f"{file}{what}: {type(error).__name__}: {error}") from error


def test_odd_values_in_generation_config_json() -> None:
    settings = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "do_sample": True,
    }
    settings |= {"max_new_tokens": 5, "skip_special_tokens": True, "presence_penalty": 0.0, "eos_token_id": [1, 2]}
    for what, odd in changed(settings):
        try:
            generation_defaults(Config(), odd)
        except ConfigError:
            continue
        except Exception as error:
            raise AssertionError(f"generation_config.json{what}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 2048, "quantization_config": KINDS["ct-w4a16-g32"].config | {"ignore": ["x"] * 20_000}},
        {"quantization_config": KINDS["ct-w4a16-g32"].config | {"ignore": ["re:(([a-z_.0-9]+)+)+!"]}},
        {"quantization_config": KINDS["fp8-block"].config | {"modules_to_not_convert": ["(.*.*.*)*!"] * 10_000}},
        {
            "quantization_config": KINDS["gptq-v1-g32"].config
            | {"dynamic": {f"+:{'.*' * i}!": {} for i in range(1, 400)}}
        },
        {"vocab_size": 10**18, "hidden_size": 10**18},
        {"vocab_size": 1, "layer_types": ["full_attention"] * 10**6},
        {"eos_token_id": list(range(10**6))},
    ],
    ids=lambda value: str(value)[:50],
)
def test_sizes_and_patterns_do_not_hang(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(whole("Llama") | change))
    start = time.process_time()
    with contextlib.suppress(ModelError):
        parameter_count(open_checkpoint(tmp_path).spec)
    assert time.process_time() - start < 20
