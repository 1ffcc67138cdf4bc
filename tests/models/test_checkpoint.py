"""Finding checkpoints and reading config.json: names, hub, old and new spellings, errors that name key and value."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import CASES, Tiny

from tuili.base.errors import ModelError
from tuili.layers.sizes import kv_bytes_per_position
from tuili.layers.spec import ModelSpec
from tuili.models import families, family_of
from tuili.models.checkpoint import HUB_FILES, HUB_SKIP, open_checkpoint

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


def parse(**changes: Any) -> ModelSpec:
    config = LLAMA | changes
    return family_of(config).parse(config)


def test_families_are_found_without_torch() -> None:
    code = (
        "import sys\nsys.modules['torch'] = None\nfrom tuili.models import families, family_of\n"
        f"assert len(families.names()) >= 9, families.broken()\nspec = family_of({LLAMA!r}).parse({LLAMA!r})\n"
        "from tuili.models.checkpoint import open_checkpoint\nprint(spec.head_dim)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "16", done.stderr


def test_no_family_is_broken() -> None:
    assert families.broken() == {}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_act": "relu6"}, "hidden_act='relu6' is not supported"),
        ({"hidden_act": "gelu_pytorch_tan"}, "Did you mean 'gelu_pytorch_tanh'"),
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers='4'"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"rms_norm_eps": -1}, "rms_norm_eps=-1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
        ({"dtype": "float8"}, "dtype='float8'"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>'"),
        ({"rope_scaling": {"type": "mrope"}}, "type='mrope'"),
        ({"hidden_act": ["silu"]}, "hidden_act=['silu']"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"vocab_size": 10**12}, "vocab_size=1000000000000"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings=1000000000000"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps=1000"),
        ({"eos_token_id": [1] * 1000}, "eos_token_id=[1, 1"),
        ({"eos_token_id": 2**40}, "eos_token_id=1099511627776"),
        ({"dtype": ["float32"]}, "dtype=['float32']"),
        ({"rope_scaling": {"type": ["yarn"]}}, "type=['yarn']"),
        ({"rope_scaling": {"type": "yarn", "factor": 1e300}}, "factor=1e+300"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "rope_theta": 1}}, "rope_theta=1"),
        ({"rope_theta": 1e-9}, "rope_theta=1e-09"),
        ({"rope_theta": "1e4"}, "rope_theta='1e4'"),
        ({"partial_rotary_factor": "half"}, "partial_rotary_factor='half'"),
        ({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "partial_rotary_factor=None"),
        ({"rope_parameters": {"full_attention": 3}}, "rope_parameters: full_attention=3"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5}, "sliding_attention": {}}},
            "the same for all layers",
        ),
        (
            {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "in rope_parameters",
        ),
        ({"architectures": ["Qwen2ForCausalLM"], "layer_types": [["full_attention"]] * 4}, "layer_types=[['full_att"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 8.5}, "sliding_window=8.5"),
        ({"architectures": [["LlamaForCausalLM"]]}, "names no architecture"),
        ({"rope_scaling": {"type": "linear"}}, "no 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2'"),
        ({"rope_scaling": [1]}, "rope_scaling=[1]"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor=[1.0]",
        ),
        ({"head_dim": 15}, "even number of head_dim=15"),
        ({"architectures": ["LlamaForCausalML"]}, "Did you mean 'LlamaForCausalLM'"),
        ({"architectures": None}, "architectures=None names no architecture"),
        ({"architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention"]}, "layer_types=['full_attention']"),
        ({"architectures": ["Qwen2ForCausalLM"], "max_window_layers": -1}, "max_window_layers=-1"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": -8}, "sliding_window=-8"),
        (
            {"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True},
            "use_bidirectional_attention=True",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError) as caught:
        parse(**changes)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}},
        ),
        ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        (
            {"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.5},
            {"architectures": ["Phi3ForCausalLM"], "rope_parameters": {"partial_rotary_factor": 0.5}},
        ),
        (
            {
                "architectures": ["Gemma3ForCausalLM"],
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "sliding_window_pattern": 2,
            },
            {
                "architectures": ["Gemma3ForCausalLM"],
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
        ),
    ],
    ids=["theta", "linear", "dtype", "partial", "gemma3"],
)
def test_old_and_new_spellings_mean_the_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert parse(**old) == parse(**new)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
GEMMA3 = {"architectures": ["Gemma3ForCausalLM"], "sliding_window": 8, "head_dim": 16}
FULL, LOCAL = {"rope_type": "default", "rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 500.0}


@pytest.mark.parametrize(
    ("found", "meant"),
    [
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": YARN}, {"rope_parameters": YARN}),
        (
            {"rope_parameters": FULL, "rope_theta": 5e5, "rope_scaling": YARN},
            {"rope_parameters": YARN | {"rope_theta": 5e5}},
        ),
        ({"rope_parameters": FULL, "rope_scaling": YARN | {"rope_theta": 5e5}}, {"rope_parameters": FULL | YARN}),
        ({"rope_parameters": YARN, "rope_scaling": YARN | {"factor": 2}}, {"rope_parameters": YARN | {"factor": 2}}),
        ({"rope_parameters": YARN, "rope_scaling": None}, {"rope_parameters": YARN}),
        ({"rope_parameters": None, "rope_scaling": YARN}, {"rope_parameters": YARN}),
        ({"rope_scaling": {"full_attention": YARN}}, {"rope_parameters": {"full_attention": YARN}}),
        (
            {"architectures": ["Phi3ForCausalLM"], "rope_parameters": {"rope_theta": 1e4}, "rope_scaling": LONGROPE},
            {"architectures": ["Phi3ForCausalLM"], "rope_parameters": LONGROPE},
        ),
        (
            GEMMA3 | {"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}
            | {"rope_theta": 5e5, "rope_local_base_freq": 500.0},
            GEMMA3 | {"rope_parameters": {"full_attention": FULL, "sliding_attention": LOCAL}},
        ),
        (
            GEMMA3 | {"rope_parameters": {"full_attention": FULL}, "rope_local_base_freq": 500.0},
            GEMMA3 | {"rope_parameters": {"full_attention": FULL, "sliding_attention": LOCAL}},
        ),
        (
            GEMMA3 | {"rope_parameters": {"sliding_attention": LOCAL, "full_attention": None}, "rope_theta": 5e5},
            GEMMA3 | {"rope_parameters": {"full_attention": FULL, "sliding_attention": LOCAL}},
        ),
        (
            GEMMA3 | {"rope_parameters": {"full_attention": FULL, "sliding_attention": LOCAL}, "rope_scaling": YARN},
            GEMMA3 | {"rope_parameters": {"full_attention": FULL | YARN, "sliding_attention": LOCAL}},
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"], "rope_theta": 5e5, "rope_parameters": {"full_attention": {}}},
            {"architectures": ["Qwen3ForCausalLM"], "rope_parameters": FULL},
        ),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_half_migrated_ropes(found: dict[str, Any], meant: dict[str, Any]) -> None:
    assert parse(**found) == parse(**meant)


@pytest.mark.parametrize("architecture", ["Gemma2ForCausalLM", "Gemma3ForCausalLM"])
@pytest.mark.parametrize("act", ["gelu", "silu", "relu", None])
def test_gemmas_hidden_act_was_a_mistake(architecture: str, act: str | None) -> None:
    assert parse(architectures=[architecture], hidden_act=act).activation == "gelu_tanh"
    assert parse(architectures=[architecture], hidden_act=act, hidden_activation="gelu").activation == "gelu"


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_early_phi3_files_call_longrope_otherwise(kind: str) -> None:
    scaling = {"type": kind, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    spec = parse(
        architectures=["Phi3ForCausalLM"],
        rope_scaling=scaling,
        max_position_embeddings=131_072,
        original_max_position_embeddings=4096,
    )
    assert (spec.rope.kind, spec.rope.original_len, dict(spec.rope.scaling)["factor"]) == ("longrope", 4096, 32)
    assert spec.max_model_len == 131_072


def test_window_null_means_none_and_silence_means_the_default() -> None:
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert parse(**mistral, sliding_window=None).windows == ()
    assert parse(**mistral).windows == (4096,) * 4
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "max_window_layers": 3}
    assert parse(**qwen, use_sliding_window=False).windows == ()
    assert parse(**qwen, use_sliding_window=True).windows == (None, None, None, 8)


@pytest.mark.parametrize("case", CASES)
def test_spec_follows_what_transformers_wrote(case: str, tiny: Tiny) -> None:
    checkpoint = open_checkpoint(tiny(case))
    assert checkpoint.spec.dtype == "float32"
    assert checkpoint.spec.eos_token_ids == (258,)
    assert checkpoint.spec.family == checkpoint.config["architectures"][0]
    assert checkpoint.tokenizer_config["eos_token"] == "<|im_end|>"


def test_real_configs_are_read(shared: Path) -> None:
    """Every config.json at hand of a family we have; facts from the models' cards."""
    read: dict[str, ModelSpec] = {}
    for path in (shared / "data" / "configs").rglob("*.json"):
        config = json.loads(path.read_text())
        named = config.get("architectures") if isinstance(config, dict) else None
        if named and named[0] in families:
            read[str(path)] = family_of(config).parse(config)
    assert len(read) >= 25

    def spec(part: str) -> ModelSpec:
        return next(s for name, s in read.items() if part in name)

    llama = spec("llama-2-7b-hf")
    assert kv_bytes_per_position(llama, "bfloat16") == 524_288
    assert spec("Llama-3.2-1B").rope.kind == "llama3"
    assert spec("gemma-2-9b-it").windows[:3] == (4096, None, 4096)
    assert (spec("Qwen3-0.6B").head_dim, spec("Qwen3-0.6B").tied) == (128, True)
    assert spec("qwen2.5-7b").windows == ()
    assert spec("mistral-nemo").head_dim == 128


def test_places_that_hold_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(ModelError, match=r"has no config.json \(found: readme.txt\)"):
        open_checkpoint(tmp_path)
    with pytest.raises(ModelError, match="is a file"):
        open_checkpoint(tmp_path / "readme.txt")
    with pytest.raises(ModelError, match=r"no directory '\./nowhere'"):
        open_checkpoint("./nowhere")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match="must hold a JSON object, not list"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"a": ')
    with pytest.raises(ModelError, match=r"config.json cannot be read as JSON"):
        open_checkpoint(tmp_path)


def test_files_that_are_no_files_or_too_large(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ModelError, match=r"has no config.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    os.mkfifo(tmp_path / "generation_config.json")
    with pytest.raises(ModelError, match=r"generation_config.json is not a regular file"):
        open_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    with (tmp_path / "generation_config.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(ModelError, match=r"generation_config.json has 1099511627776 bytes, and at most"):
        open_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_bytes(b"\xff")
    with pytest.raises(ModelError, match=r"generation_config.json cannot be read as UTF-8"):
        open_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_bytes(b"\xef\xbb\xbf{}")
    assert open_checkpoint(tmp_path).spec.num_layers == 4  # a byte order mark is none of its content


@pytest.mark.parametrize(
    "path", ["original/x.json", "a/x.jinja", "additional/x.jinja", "additional_chat_templates_/x.json"]
)
def test_of_the_hubs_folders_only_that_of_templates_is_fetched(path: str) -> None:
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
    kept = filter_repo_objects([*wanted, path], allow_patterns=HUB_FILES, ignore_patterns=HUB_SKIP)
    assert list(kept) == wanted


def test_code_in_a_checkpoint_is_not_run(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("tuili"), "propagate", True)  # log.setup of another test turns it off
    config = json.loads((tiny("llama") / "config.json").read_text()) | {"auto_map": {"AutoModel": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with caplog.at_level("INFO", "tuili"):
        open_checkpoint(tmp_path)
    assert "never runs it" in caplog.text


def test_hub_ids_are_fetched(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tiny("qwen3"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    checkpoint = open_checkpoint("Qwen/Qwen3-0.6B", revision="abc")
    assert checkpoint.name == "Qwen/Qwen3-0.6B"
    assert checkpoint.spec.qk_norm
    assert (asked["name"], asked["revision"]) == ("Qwen/Qwen3-0.6B", "abc")
    assert not any(pattern.endswith((".bin", ".py", ".pt", "*")) for pattern in asked["allow_patterns"])


def test_offline_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, **options: Any) -> str:
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=r"no route to host\).*local directory.*HF_HOME.*'embedded'"):
        open_checkpoint("owner/model")
