"""Which device and ops a config gets: what can not run is told, with the way out; what was asked for is refused."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from tuili.base.config import Config
from tuili.base.errors import ConfigError
from tuili.base.hardware import probe
from tuili.engine.device import able, arithmetic, backend
from tuili.ops import cpu
from tuili.ops.triton import TritonSupport

WITH_CARD = replace(probe(), gpu="H200", gpu_memory=2**37, gpu_free=2**37)
INTERPRETED = TritonSupport(True, interpreted=True)
COMPILED = TritonSupport(True, card="H200")
ABSENT = TritonSupport(False, why="Triton is not installed: pip install 'tuili[gpu]'")
NO_CARD = TritonSupport(False, why="no CUDA device (set TRITON_INTERPRET=1 to test the kernels on a CPU, slowly)")


@pytest.fixture
def here(monkeypatch):
    """``here(cuda, found)``: torch can use a card or not, and Triton is as ``found``."""

    def make(cuda: bool, found: TritonSupport) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr("tuili.ops.triton.describe", lambda: found)

    return make


@pytest.mark.parametrize(
    ("options", "found", "expected"),
    [
        ({}, COMPILED, "triton"),
        ({"kernels": "triton"}, COMPILED, "triton"),
        ({"deterministic": True}, COMPILED, "triton_invariant"),
        ({"kernels": "reference"}, COMPILED, "reference"),
        ({}, ABSENT, "reference"),
        ({}, INTERPRETED, "reference"),
    ],
)
def test_on_a_card(here, caplog, options, found, expected):
    here(True, found)
    with caplog.at_level(logging.WARNING, "tuili"):
        config, machine = able(Config(device="cuda", **options), WITH_CARD)
    assert machine == WITH_CARD
    assert backend(config) == expected
    told = "references" in caplog.text
    assert told == (expected == "reference" and "kernels" not in options), "a slow way that nobody asked for is told"


@pytest.mark.parametrize(
    ("options", "found", "said"),
    [
        ({"kernels": "triton"}, ABSENT, "not installed"),
        ({"kernels": "triton"}, INTERPRETED, "unset it"),
        ({"deterministic": True}, ABSENT, "not installed"),
        ({"deterministic": True, "kernels": "reference"}, COMPILED, "leave --kernels reference out"),
    ],
)
def test_what_a_card_can_not_do_is_refused(here, options, found, said):
    here(True, found)
    with pytest.raises(ConfigError, match=said):
        able(Config(device="cuda", **options), WITH_CARD)


@pytest.mark.parametrize(("version", "said"), [(None, "without CUDA"), ("13.0", "newer driver")])
def test_a_card_that_torch_can_not_use_is_left_out_and_told(here, monkeypatch, caplog, version, said):
    here(False, NO_CARD)
    monkeypatch.setattr(torch.version, "cuda", version)
    with caplog.at_level(logging.WARNING, "tuili"):
        _, machine = able(Config(), WITH_CARD)
    assert (machine.gpu, machine.gpu_free) == (None, 0)
    assert "H200" in caplog.text
    assert said in caplog.text
    with pytest.raises(ConfigError, match=said):
        able(Config(device="cuda"), WITH_CARD)
    assert able(Config(device="cpu"), WITH_CARD) == (Config(device="cpu"), WITH_CARD), "nobody asked torch"


def test_on_a_cpu_triton_is_interpreted(here):
    here(False, INTERPRETED)
    machine = replace(WITH_CARD, gpu=None)
    for deterministic, expected in ((False, "triton"), (True, "triton_invariant")):
        config, _ = able(Config(kernels="triton", deterministic=deterministic), machine)
        assert backend(config.with_(device="cpu")) == expected
    for found in (COMPILED, NO_CARD):
        here(False, found)
        with pytest.raises(ConfigError, match="set TRITON_INTERPRET=1"):
            able(Config(kernels="triton"), machine)
    here(False, ABSENT)
    with pytest.raises(ConfigError, match="not installed"):
        able(Config(kernels="triton"), machine)


def test_compiling_needs_a_compiler_and_the_headers(monkeypatch):
    config = Config(device="cpu", compile=True)
    assert able(config, WITH_CARD)[0] == config
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/no/such/folder")
    with pytest.raises(ConfigError, match="python3-dev"):
        able(config, WITH_CARD)
    monkeypatch.setenv("CXX", "no-such-compiler-of-ours")
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler 'no-such-compiler-of-ours': apt install g\\+\\+"):
        able(config, WITH_CARD)
    assert able(config.with_(compile=False), WITH_CARD), "nothing is asked of who does not compile"


@pytest.mark.skipif(not cpu.describe().built, reason=cpu.describe().why)
@pytest.mark.parametrize(
    ("options", "rounded", "said"),
    [
        ({}, "", "weights bfloat16, computed in float32 by the {isa} kernels"),
        ({"dtype": "float16"}, "", "weights float16, computed in float32 by the {isa} kernels"),
        ({"activation_dtype": "bfloat16"}, "", "weights bfloat16, computed in bfloat16 by the {isa} kernels"),
        ({}, "gptq", "weights as gptq rounded them, others bfloat16, computed in float32 by the {isa} kernels"),
        (
            {"quantization": "int4"},
            "",
            "weights int4 g32, multiplied by activations rounded to int8, all else computed in float32 by the {isa} "
            "kernels",
        ),
        (
            {"quantization": "int8_weight_only"},
            "",
            "weights int8 weight-only, computed in float32 by the {isa} kernels",
        ),
        (
            {"kernels": "reference", "activation_dtype": "bfloat16"},
            "",
            "weights bfloat16, computed in bfloat16 by torch's references",
        ),
        (
            {"device": "cuda", "activation_dtype": "bfloat16", "quantization": "int4"},
            "",
            "weights int4 g32, computed in bfloat16 by the Triton kernels",
        ),
    ],
)
def test_storage_and_arithmetic_in_words(options, rounded, said):
    config = Config(**{"device": "cpu", "dtype": "bfloat16", "activation_dtype": "float32", **options})
    assert arithmetic(config, rounded) == said.format(isa=cpu.describe().isa)


def test_on_a_cpu_the_kernels_that_were_built_compute(monkeypatch, caplog):
    plain = Config(device="cpu")
    assert backend(plain) == ("cpu" if cpu.describe().built else "reference")
    assert backend(plain.with_(deterministic=True)) == backend(plain), "all of them are invariant"
    monkeypatch.setattr(cpu, "describe", lambda: cpu.LibrarySupport("", 0, "no compiler was there"))
    with caplog.at_level(logging.INFO, "tuili"):
        able_config, _ = able(plain, replace(WITH_CARD, gpu=None))
    assert backend(able_config) == backend(plain) == "reference"
    assert "no compiler was there" in caplog.text
    assert backend(plain.with_(kernels="reference")) == "reference"
