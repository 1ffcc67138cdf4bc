"""Who decides a sampling default: user, override, file, neutral."""

from __future__ import annotations

import json
import logging

import pytest

from tuili.base.config import Config
from tuili.base.errors import ConfigError
from tuili.core.params import SamplingParams
from tuili.engine.generation_config import NEUTRAL, generation_defaults

FILE = {"temperature": 0.6, "top_k": 20, "max_new_tokens": 99, "eos_token_id": [1, 2], "transformers_version": "5"}


def test_neutral_without_a_file():
    defaults = generation_defaults(Config(), {})
    assert defaults.values == NEUTRAL
    assert set(defaults.sources.values()) == {"neutral"}
    assert SamplingParams(**defaults.sampling()) == SamplingParams()


def test_the_models_file_is_the_default_and_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "tuili"):
        defaults = generation_defaults(Config(), FILE)
    assert defaults.values == {**NEUTRAL, "temperature": 0.6, "top_k": 20, "max_new_tokens": 99}
    assert defaults.sources["temperature"] == "generation_config.json"
    assert defaults.sources["top_p"] == "neutral"
    assert defaults.sampling()["max_tokens"] == 99
    assert "temperature=0.6" in caplog.text


def test_vllm_means_neutral():
    assert generation_defaults(Config(generation_config="vllm"), FILE).values == NEUTRAL


def test_override_beats_the_file_and_a_directory_replaces_it(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_p": 0.5, "temperature": 0.1}))
    config = Config(generation_config=str(tmp_path), override_generation_config='{"temperature": 0.9}')
    defaults = generation_defaults(config, FILE)
    assert (defaults.values["top_p"], defaults.values["temperature"], defaults.values["top_k"]) == (0.5, 0.9, 0)
    assert defaults.sources["temperature"] == "--override-generation-config"
    assert defaults.sources["top_p"].startswith(str(tmp_path))


def test_do_sample_false_is_greedy_unless_overridden():
    greedy = {"do_sample": False, "temperature": 0.7}
    assert generation_defaults(Config(), greedy).values["temperature"] == 0.0
    override = Config(override_generation_config='{"temperature": 0.3}')
    assert generation_defaults(override, greedy).values["temperature"] == 0.3
    assert generation_defaults(Config(), {"do_sample": True, "temperature": 0.7}).values["temperature"] == 0.7


@pytest.mark.parametrize(
    ("options", "file", "said"),
    [
        ({"override_generation_config": "{"}, {}, "not JSON"),
        ({"override_generation_config": "[]"}, {}, "JSON object"),
        ({"override_generation_config": '{"temprature": 1}'}, {}, "temprature"),
        ({"override_generation_config": '{"temperature": 9}'}, {}, "--override-generation-config: temperature"),
        ({"generation_config": "/nowhere"}, {}, "cannot read"),
        ({}, {"top_p": 7}, "generation_config.json: top_p"),
    ],
)
def test_errors_name_the_source(options, file, said):
    with pytest.raises(ConfigError, match=said):
        generation_defaults(Config(**options), file)
