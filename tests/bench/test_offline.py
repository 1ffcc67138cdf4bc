"""The engine in this process under load: a real engine on a tiny random model; what is counted must agree with the
clock."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tuili.base.config import Config
from tuili.base.errors import TuiliError
from tuili.bench import arms, offline
from tuili.bench.offline import TimedStep, host_overhead, step_times
from tuili.bench.workload import Item, Span, Workload, fixed_random, preset
from tuili.core.plan import StepStats

if TYPE_CHECKING:
    from tiny_models import Tiny

    from tuili.engine.text import TextEngine


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Path:
    return tiny("llama")


@pytest.fixture(scope="module")
def config(model: Path) -> Config:
    return Config(model=str(model), threads=1, max_num_seqs=4)


@pytest.fixture(scope="module")
def engine(config: Config) -> Iterator[TextEngine]:
    engine = arms.open_engine(config, 4)
    yield engine
    engine.close()


def test_a_batch_runs_to_its_end_and_the_parts_are_the_wall(engine: TextEngine) -> None:
    work = preset("mixed", 12, max_len=128, vocab=arms.vocabulary(engine))
    got = offline.throughput(engine, work)
    assert got["completed"] == 12
    assert got["total_input_tokens"] == work.input_tokens
    assert got["total_output_tokens"] == work.output_tokens
    seconds = got["steps"]["seconds"]
    parts = sum(seconds[name] for name in ("schedule", "device", "update", "dispatch", "between"))
    assert parts == pytest.approx(seconds["wall"], rel=0.01)
    assert seconds["wall"] == pytest.approx(got["duration"], rel=0.1), "the rest is submitting and the last delivery"
    assert 0 <= seconds["dispatch"] < 0.2 * seconds["wall"], "what the engine's record does not name is small"
    assert seconds["device"] > 0.3 * seconds["wall"]
    # Every token is computed once: the prompt without what was reused, and each output token but the last of a request.
    assert got["steps"]["tokens"] == work.input_tokens - got["cached_tokens"] + work.output_tokens - 12
    assert got["sum_of_parts"]["ratio"] == pytest.approx(1.0, abs=0.01)


def test_all_requests_wait_before_the_first_step(engine: TextEngine) -> None:
    """Else static batching would start with a batch of one."""
    work = fixed_random(8, Span(16, 16), Span(4, 4), vocab=(0, 256))
    run, steps = asyncio.run(offline.run_all(engine, work, lambda record: None))
    assert len(run.records) == 8
    assert steps[0].stats.num_requests == 4
    assert steps[0].stats.num_waiting == 4


def test_repeats_do_not_reuse_each_others_prefixes(engine: TextEngine) -> None:
    work = fixed_random(4, Span(64, 64), Span(2, 2), vocab=(0, 256))
    assert [offline.throughput(engine, work)["cached_tokens"] for _ in range(2)] == [0, 0]


def test_a_failed_request_fails_the_measurement(engine: TextEngine) -> None:
    with pytest.raises(TuiliError, match=r"1 of 2 requests failed.*RequestError"):
        offline.throughput(engine, Workload("x", 0, (Item((1,), 2), Item((1,) * 500, 2))))


def test_latency_of_batches(engine: TextEngine) -> None:
    works = [fixed_random(size, Span(8, 8), Span(12, 12), vocab=(0, 256)) for size in (1, 4)]
    got = arms.latency(engine, works, warmups=1, repeats=3)
    for arm, size in zip(got["arms"], (1, 4), strict=True):
        assert arm["batch_size"] == size
        assert len(arm["latencies_ms"]) == 3
        assert arm["latency_ms"]["min"] <= arm["latency_ms"]["median"] <= arm["latency_ms"]["p99"]
        host = arm["steps"]["host_ms_per_decode_step"][str(size)]
        assert host["steps"] >= 8
        assert 0 < host["own"] < host["total"]
    assert got["provenance"]["config"]["max_num_seqs"] == 4


def test_arms_of_a_comparison(config: Config) -> None:
    """Static batching and no reuse: same tokens out, more steps, no cached token; each arm keeps its resolved
    config."""
    work = preset("chat", 10, max_len=128, vocab=(0, 256))
    pair = [
        arms.Arm({"policy": "fcfs"}, config, 4),
        arms.Arm({"policy": "static"}, config.with_(scheduling_policy="static", enable_prefix_caching=False), 4),
    ]
    (continuous, static), used = arms.compare(pair, lambda engine: work, repeats=2)
    assert used is work
    assert continuous["total_output_tokens"] == static["total_output_tokens"] == 2 * work.output_tokens
    assert static["steps"]["count"] > continuous["steps"]["count"]
    assert continuous["cached_tokens"] > 0
    assert static["cached_tokens"] == 0
    assert static["config"]["scheduling_policy"] == "static"
    assert len(static["runs"]) == 2


def step(number: int, begin: float, rows: int, prefill: int = 0) -> TimedStep:
    """schedule 1 ms, device 10 ms, update 2 ms, told 1 ms after that."""
    stats = StepStats(
        step=number, started=begin + 0.001, schedule_seconds=0.001, device_seconds=0.010, update_seconds=0.002,
        num_requests=rows, num_prefill_tokens=prefill, num_tokens=rows,
    )  # fmt: skip
    return TimedStep(stats, begin + 0.014)


def test_host_overhead_by_hand() -> None:
    """Steps 0-1 and 1-2 decode two rows, 20 ms apart: 20 - 10 = 10 ms of host, 3 of them the engine's own."""
    steps = [step(0, 0.0, 2), step(1, 0.020, 2), step(2, 0.040, 2), step(3, 0.060, 3, prefill=5), step(5, 0.100, 3)]
    host = host_overhead(steps)
    assert set(host) == {"2"}
    assert host["2"] == pytest.approx({"steps": 2, "total": 10.0, "own": 3.0})
    seconds = step_times(steps)["seconds"]
    assert seconds["wall"] == pytest.approx(0.114)
    assert seconds["between"] == pytest.approx(0.006 * 3 + 0.026)
    assert seconds["dispatch"] == pytest.approx(5 * 0.001)
