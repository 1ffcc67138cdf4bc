"""Config, registry, errors, clocks: options are typed and bounded, plugins found, messages name what is wrong."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuili.base.clock import VirtualClock
from tuili.base.config import Config, dump, load, option_type, options
from tuili.base.errors import ConfigError, RequestError, nearest
from tuili.base.hardware import probe
from tuili.base.registry import Registry
from tuili.core.params import SamplingParams


def test_every_option_is_documented() -> None:
    names = [item.name for item in options()]
    assert 20 < len(names) <= 60
    for item in options():
        assert item.metadata["help"].endswith("."), item.name
        assert item.metadata["group"] in ("model", "cache", "scheduler", "server")
        kind, optional = option_type(item.name)
        assert kind in (str, int, float, bool)
        assert optional == (item.default is None)


def test_dump_and_load_round_trip(tmp_path: Path) -> None:
    config = Config(model='a "quoted" \\ path', max_num_seqs=7, gpu_memory_utilization=0.5, enable_prefix_caching=False)
    file = tmp_path / "c.toml"
    file.write_text(dump(config))
    assert load(file, {}) == config


def test_order_is_defaults_file_command_line(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("block-size = 32\n[scheduler]\nmax_num_seqs = 5\n")
    config = load(file, {"max_num_seqs": 9, "port": None})
    assert (config.block_size, config.max_num_seqs, config.port) == (32, 9, 8000)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_size": 0}, ["--block-size", "at least 1", "0"]),
        ({"block_size": "16"}, ["--block-size", "int", "'16'"]),
        ({"block_size": True}, ["--block-size"]),
        ({"dtype": "bfloat"}, ["--dtype", "bfloat16"]),
        ({"port": 70000}, ["--port", "65535"]),
        ({"gpu_memory_utilization": 1.5}, ["--gpu-memory-utilization", "at most 1"]),
    ],
)
def test_wrong_values_are_named(changes: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        Config(**changes)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400, "a\udce9"])
@pytest.mark.parametrize("name", ["shutdown_seconds", "gpu_memory_utilization", "seed", "model", "served_model_name"])
def test_what_no_file_can_carry_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match="--" + name.replace("_", "-")):
        Config(**{name: value})


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])), st.floats(0, 1e300), st.integers(0, 2**63 - 1))
def test_a_dumped_config_is_read_back(text: str, seconds: float, seed: int) -> None:
    config = Config(served_model_name=text, chat_template=text + '\x7f\x00\r\n"\\', shutdown_seconds=seconds, seed=seed)
    with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8", newline="") as file:
        file.write(dump(config))
        file.flush()
        assert load(file.name, {}) == config


def test_odd_but_right_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_bytes(b"\xef\xbb\xbf[scheduler]\r\nmax-num-seqs = 5\r\n")
    assert load(file, {}).max_num_seqs == 5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a = = 1", "not valid TOML"),
        (b"model = 'caf\xe9'", "not valid TOML"),
        (b"a = " + b"[" * 20_000, "not valid TOML"),
        (b"seed = " + b"9" * 5000, "not valid TOML"),
        (b"gpu_memory_utilization = nan", "--gpu-memory-utilization must be a finite number"),
        (b"seed = 9223372036854775808", "--seed must fit into 64 bits"),
        (b"block_size = 16\n[cache]\nblock_size = 32", "sets block_size twice"),
        (b"block-size = 16\nblock_size = 32", "sets block_size twice"),
    ],
)
def test_wrong_contents_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "c.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load(file, {})


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path / "missing.toml", {})
    file = tmp_path / "c.toml"
    file.write_text("a = = 1")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(file, {})
    file.write_text("max_num_seq = 1")
    with pytest.raises(ConfigError, match="Did you mean 'max_num_seqs'"):
        load(file, {})


def test_registry_finds_plugins_and_names_broken_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "plugs_for_test"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from tuili.base.registry import Registry\nplugs = Registry('plug', 'plugs_for_test')\n"
    )
    (package / "good.py").write_text("from plugs_for_test import plugs\n@plugs.register('good')\ndef f(): pass\n")
    (package / "bad.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugs: Registry = __import__("plugs_for_test").plugs
    try:
        assert plugs.names() == ["good"]
        with pytest.raises(ConfigError) as error:
            plugs.get("goood")
        for word in ("unknown plug 'goood'", "Did you mean 'good'", "plugs_for_test.bad", "a_module_that_is_not_there"):
            assert word in str(error.value)
    finally:
        for name in [n for n in sys.modules if n.startswith("plugs_for_test")]:
            del sys.modules[name]


def test_nearest() -> None:
    assert nearest("fcsf", ["fcfs", "priority"]) == " Did you mean 'fcfs'? Known: fcfs, priority."


def test_virtual_clock_moves_only_forward() -> None:
    clock = VirtualClock(2.0)
    clock.advance(0.5)
    assert clock.now() == 2.5
    with pytest.raises(ValueError, match="back"):
        clock.advance(-1)


def test_probe_describes_this_machine() -> None:
    machine = probe()
    assert machine.cores >= 1
    assert 0 < machine.available_memory <= machine.total_memory


@pytest.mark.parametrize(
    ("wishes", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"n": 0}, "n"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 20}, "min_tokens"),
        ({"logprobs": -2}, "logprobs"),
        ({"seed": 2**63}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"bad_words": [""]}, "bad_words"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"logit_bias": {1: 101}}, "logit_bias[1]"),
    ],
)
def test_sampling_values_out_of_range_name_the_field(wishes: dict, param: str) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**wishes)
    assert error.value.param == param


def test_sampling_params_normalise() -> None:
    p = SamplingParams(stop="a", top_k=-1, max_tokens=None, eos_token_ids=(2,), stop_token_ids=[5, 2])
    assert (p.stop, p.top_k, p.stop_ids) == (("a",), 0, (2, 5))
    assert p.with_(ignore_eos=True).stop_ids == (5, 2)
    assert dataclasses.replace(p, temperature=0.0).greedy


def test_waiting_threads_sleep_before_torch_is_loaded() -> None:
    """The engine's own start-up path settles it: torch must not be imported by then."""
    script = """
import os, sys
import tuili.engine.build as build
from tuili.base.threads import let_waiting_threads_sleep
assert let_waiting_threads_sleep(), "torch was imported too early"
assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
"""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=120)
