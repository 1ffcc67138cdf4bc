"""The engine on a card that is none: memory measured and shared out as on one, and what is said where it ends.

The device is the host, Triton is interpreted, and the card's numbers are a fake's.
"""

from __future__ import annotations

import logging
import re
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import prompt, reference_greedy

from tuili import LLM, SamplingParams
from tuili.base.config import Config, dump, load
from tuili.base.errors import ConfigError, EngineDead
from tuili.base.hardware import probe
from tuili.engine import build
from tuili.engine.captures import capture_sizes
from tuili.engine.memory import ALLOCATING, COMPUTING, LOADING, MEASURING, Measured, memory_of, savings
from tuili.engine.profile import asked_for, largest_step, measure
from tuili.engine.resolve import resolve
from tuili.layers.spec import ModelSpec, RopeSpec
from tuili.ops.triton import TritonSupport, describe
from tuili.runtime.host import Interpreter

MIB, GIB = 1 << 20, 1 << 30
CARD = replace(probe(), gpu="H200", gpu_memory=4 * GIB, gpu_free=3 * GIB, cores=1)
SPEC = ModelSpec("llama", 32_000, 512, 1024, 8, 8, 4, 64, 4096, RopeSpec(64), dtype="bfloat16")
#: Small engines, so that interpreted steps are quick.
SMALL = {"max_num_seqs": 3, "max_num_batched_tokens": 48, "threads": 1}
interpreted = pytest.mark.skipif(not describe().interpreted, reason=describe().why or "Triton is not interpreted")


class Card:
    """A card's memory with what a run does to it: a ``Meter``, and executors for ``measure``."""

    def __init__(self, weights: int, activations: int, first: int, other: int, context: int, others: int = 0):
        self.truth = Measured(weights, activations, 0, context)
        self.first, self.other, self.others = first, other, others
        self.tensors = self.top = self.graphs = 0
        self.open = 0
        self.steps: list[Any] = []

    def allocated(self) -> int:
        return self.tensors

    def peak(self) -> int:
        return self.top

    def restart(self) -> None:
        self.top = self.tensors

    def taken(self) -> int:
        return self.tensors + self.graphs + self.outside()

    def outside(self) -> int:
        return self.others + self.truth.context

    def executor(self, blocks: int, sizes: Any) -> Executor:
        return Executor(self, blocks, len(sizes))


class Executor:
    def __init__(self, card: Card, blocks: int, graphs: int):
        self.card, self.pool = card, blocks * MIB
        card.tensors += self.pool
        card.graphs += card.first + (graphs - 1) * card.other if graphs else 0
        card.open += 1

    def execute(self, plan: Any) -> Future[None]:
        self.card.steps.append(plan)
        self.card.top = max(self.card.top, self.card.tensors + self.card.truth.activations)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def close(self) -> None:
        self.card.tensors -= self.pool
        self.card.graphs = 0
        self.card.open -= 1


# Measuring ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("captured", [None, 1, 2, 40])
def test_what_a_card_shows_is_measured(captured: int | None) -> None:
    """Weights of another engine, other processes and the pools of the measurement are not counted."""
    hardware = replace(CARD, gpu_memory=64 * GIB, gpu_free=60 * GIB)
    how = {"enforce_eager": True} if captured is None else {"max_cudagraph_capture_size": captured}
    config = resolve(Config(device="cuda", **how), SPEC, hardware)
    card = Card(weights=5 * GIB, activations=700 * MIB, first=100 * MIB, other=3 * MIB, context=400 * MIB, others=GIB)
    card.tensors = before = 2 * GIB
    card.tensors += card.truth.weights
    found = measure(config, card.executor, card, before, outside=GIB)
    sizes = capture_sizes(config)
    graphs = 100 * MIB + (len(sizes) - 1) * 3 * MIB if sizes else 0
    assert found == replace(card.truth, graphs=graphs)
    assert (card.open, card.tensors) == (0, before + 5 * GIB), "nothing is left of the measurement"


@pytest.mark.parametrize(("rows", "tokens", "length"), [(256, 8192, 4096), (4, 8192, 1000), (1, 7, 5), (8, 8, 64)])
def test_the_largest_step_has_all_rows_and_tokens(rows: int, tokens: int, length: int) -> None:
    config = Config(max_num_seqs=rows, max_num_batched_tokens=tokens, max_model_len=length)
    plan = largest_step(config)
    assert len(plan.chunks) == rows
    assert plan.num_tokens == min(tokens, rows * length)
    assert all(chunk.sample and chunk.admitted and 1 <= chunk.count <= length for chunk in plan.chunks)
    for chunk in plan.chunks:
        assert len(chunk.new_blocks) == -(-chunk.count // config.block_size)
        assert set(chunk.new_blocks) <= set(plan.chunks[0].new_blocks), "one request's blocks serve all"


# The engine -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """This machine with a card, whose engine computes on the host."""
    found = Card(weights=200 * MIB, activations=300 * MIB, first=20 * MIB, other=MIB, context=500 * MIB, others=GIB)
    monkeypatch.setattr(build, "probe", lambda: CARD)
    monkeypatch.setattr(build, "open_device", lambda config: Interpreter())
    monkeypatch.setattr(build, "place_of", lambda config: "cpu")
    monkeypatch.setattr("tuili.engine.profile.CudaMeter", lambda: found)
    monkeypatch.setattr("tuili.ops.triton.describe", lambda: TritonSupport(True, card="H200"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return found


def greedy(count: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)


@interpreted
def test_on_a_card_the_engine_says_the_same_and_its_config_reproduces_it(tiny, card, caplog, tmp_path, monkeypatch):
    model = str(tiny("llama"))
    with caplog.at_level(logging.INFO, "tuili"), LLM(model, **SMALL) as llm:
        config = llm.engine.config
        assert (config.device, llm.engine.client.engine.depth) == ("cuda", 2)
        assert llm.engine.client.engine.executor.runner.captured.shapes == [(1, 1), (2, 1), (3, 1)]
        ids = prompt(9)
        assert llm.generate([ids], greedy(4))[0].outputs[0].token_ids == reference_greedy(tiny("llama"), ids, 4)
    for word in (
        "memory of H200",
        "weights",
        "activations",
        "CUDA context",
        "as measured",
    ):
        assert word in caplog.text
    file = tmp_path / "resolved.toml"
    file.write_text(dump(config))
    monkeypatch.setattr("tuili.engine.profile.measure", None)  # a resolved config is not measured again
    with LLM(**{"model": model} | {k: v for k, v in vars(load(file, {})).items() if k != "model"}) as again:
        assert again.engine.config == config


@interpreted
def test_the_pool_is_what_measurement_leaves(tiny, card, monkeypatch):
    """As many blocks as fit beside what the card showed; the rows could need more."""
    small = replace(CARD, gpu_memory=1024 * MIB, gpu_free=1000 * MIB)
    monkeypatch.setattr(build, "probe", lambda: small)
    left = 17 * MIB
    taken = Measured(0, 0, 0, int(0.9 * 1024 * MIB) - left)
    monkeypatch.setattr("tuili.engine.profile.measure", lambda *_: taken)
    with LLM(str(tiny("llama")), max_num_seqs=2000, max_num_batched_tokens=2000) as llm:
        config = llm.engine.config
    per_block = config.kv_cache_memory_bytes // config.num_gpu_blocks_override
    assert config.num_gpu_blocks_override == left // per_block - 1 < 2000 * 256 // 16


# Where memory ends ----------------------------------------------------------------------------------------------------


def out_of_memory(size: str = "96.00 MiB") -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(
        f"CUDA out of memory. Tried to allocate {size}. GPU 0 has a total capacity of 4.00 GiB"
    )


def test_torch_says_how_much_it_wanted() -> None:
    assert asked_for(out_of_memory("2.50 GiB")) == int(2.5 * GIB)
    assert asked_for(out_of_memory("512 bytes")) == 512
    assert asked_for(torch.OutOfMemoryError("something else")) == 0


@pytest.mark.parametrize("doing", [LOADING, MEASURING, ALLOCATING, COMPUTING])
@pytest.mark.parametrize("size", [MIB, 64 * MIB, 700 * MIB, 40 * GIB, 0])
def test_what_is_proposed_saves_as_much_as_was_lacking(doing: str, size: int) -> None:
    config = resolve(Config(device="cuda"), SPEC, CARD)
    memory = memory_of(config, SPEC, CARD)

    def taken(config: Config) -> int:
        after = memory_of(config, SPEC, CARD)
        return after.beside_kv + config.num_gpu_blocks_override * after.block

    text = savings(config, SPEC, memory, size, doing)
    assert "KV cache" in text
    proposed = re.findall(r"^  --([a-z-]+) ?([^\s(]*)", text.split("What would fit:")[1], re.MULTILINE)
    assert proposed or "more free" in text
    for flag, value in proposed:
        changed = {flag.replace("-", "_"): int(value) if value.isdigit() else value or True}
        if flag == "enforce-eager":
            changed["max_cudagraph_capture_size"] = None
        other = config.with_(**changed)
        assert taken(config) - taken(other) >= size, flag
        resolve(other, SPEC, replace(CARD, gpu_free=64 * GIB))
    if size == MIB and doing in (ALLOCATING, COMPUTING):
        assert len(proposed) >= 3


@interpreted
@pytest.mark.parametrize(
    ("where", "doing"),
    [
        ("tuili.models.weights.load_model", LOADING),
        ("tuili.runtime.host.Host.submit", MEASURING),
        ("tuili.engine.profile.measure", MEASURING),
        ("tuili.runtime.host.Host.capture", MEASURING),
    ],
)
def test_at_the_start_it_is_told_with_what_would_fit(tiny, card, monkeypatch, where: str, doing: str):
    def ends(*_: Any, **__: Any) -> None:
        raise out_of_memory()

    monkeypatch.setattr(where, ends)
    with pytest.raises(ConfigError) as raised:
        LLM(str(tiny("llama")), **SMALL)
    for word in (doing, "asked for 96.0 MiB", "What would fit:", "weights", "CUDA context"):
        assert word in str(raised.value)


@interpreted
def test_while_the_cache_is_made_it_is_told_too(tiny, card, monkeypatch):
    def ends(*_: Any, **__: Any) -> None:
        raise out_of_memory("1.00 MiB")

    monkeypatch.setattr("tuili.runtime.kvstore.KVStore._zeros", ends)
    with pytest.raises(ConfigError, match=ALLOCATING):
        LLM(str(tiny("llama")), num_gpu_blocks_override=40, **SMALL)


@interpreted
def test_in_a_step_the_engine_dies_of_it_and_says_what_would_fit(tiny, card, monkeypatch):
    llm = LLM(str(tiny("llama")), num_gpu_blocks_override=400, enforce_eager=True, **SMALL)

    def ends(*_: Any, **__: Any) -> None:
        raise out_of_memory("1.00 MiB")

    monkeypatch.setattr("tuili.layers.decoder.Decoder.forward", ends)
    with pytest.raises(EngineDead) as raised:
        llm.generate([prompt(5)], greedy(2))
    for word in (COMPUTING, "asked for 1.0 MiB", "--num-gpu-blocks-override"):
        assert word in str(raised.value)
    llm.close()
