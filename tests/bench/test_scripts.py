"""The scripts behind `make bench` and `make soak`: their verdicts by hand, and a small run of each."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from tuili.bench.http import Client, ClientResponse

if TYPE_CHECKING:
    from tiny_models import Tiny

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", BENCHMARKS / "soak.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module
    spec.loader.exec_module(module)
    return module


def state(soak: ModuleType, rss: list[float]) -> Any:
    """A run in which all went well, with this memory."""
    made = soak.Soak(Client("http://127.0.0.1:1"), "m", 256, random.Random(0))
    made.series = [{"rss": value, "running": 4.0, "waiting": 2.0} for value in rss]
    made.sent = Counter(stream=3, plain=2, leave=1, half_sent=1, bad=1)
    made.statuses = Counter({"200": 5, "400": 1, "503": 1})
    return made


IDLE = {"running": 0.0, "waiting": 0.0, "kv_usage": 0.0}


def test_a_good_run_passes(soak: ModuleType) -> None:
    held = soak.verdicts(state(soak, [50.0, 90.0, 100.0, 100.0, 101.0, 102.0]), IDLE, 0, bound=0.03)
    assert all(held.values()), held


@pytest.mark.parametrize(
    ("broken", "change"),
    [
        ("memory is flat", {"series": [{"rss": 100.0 + 4 * i, "waiting": 1.0} for i in range(6)]}),
        ("no 5xx but 503", {"statuses": Counter({"200": 5, "500": 1})}),
        ("every request ended as it must", {"wrong": ["a stream was cut"]}),
        ("all kinds of clients came", {"sent": Counter(stream=3)}),
    ],
)
def test_each_broken_promise_is_seen(soak: ModuleType, broken: str, change: dict[str, Any]) -> None:
    run = state(soak, [100.0] * 6)
    for name, value in change.items():
        setattr(run, name, value)
    held = soak.verdicts(run, IDLE, 0, bound=0.03)
    assert [promise for promise, kept in held.items() if not kept] == [broken]


def test_leaks_and_a_bad_end_are_seen(soak: ModuleType) -> None:
    run = state(soak, [100.0] * 6)
    assert not soak.verdicts(run, IDLE | {"kv_usage": 0.1}, 0, 0.03)["no KV block leaked"]
    assert not soak.verdicts(run, IDLE | {"waiting": 1.0}, 0, 0.03)["nothing runs or waits when idle"]
    assert not soak.verdicts(run, IDLE, None, 0.03)["the server stopped by itself"]


def test_a_good_request_may_be_refused_only_by_a_typed_503(soak: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    run = state(soak, [1.0] * 3)
    typed = bytearray(b'{"error": {"message": "full", "type": "ServiceUnavailableError"}}')
    monkeypatch.setattr(soak, "REFUSED_SECONDS", 0.0)
    asyncio.run(run.refused("plain", ClientResponse(503, {}, typed)))
    assert not run.wrong
    asyncio.run(run.refused("plain", ClientResponse(503, {}, bytearray(b"oops"))))
    asyncio.run(run.refused("plain", ClientResponse(400, {}, typed)))
    assert len(run.wrong) == 2


@pytest.mark.slow
def test_a_short_soak(tiny: Tiny, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "soak.py"), "--model", str(tiny("llama")), "--minutes", "0.2"]
    command += ["--clients", "24", "--rss-bound", "0.2", "--out", str(tmp_path), "--", "--max-num-seqs", "4"]
    done = subprocess.run(
        [*command, "--num-gpu-blocks-override", "24"], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "soak.json").read_text())
    assert result["passed"]
    assert result["outcomes"]["stream finished"] > 0
    assert result["idle"]["kv_usage"] == 0


@pytest.mark.slow
def test_a_small_engine_benchmark(tiny: Tiny, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "engine.py"), "--smoke", "--model", str(tiny("llama"))]
    subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, timeout=240, check=True)
    report = json.loads((tmp_path / "engine.json").read_text())
    for entry in report["workloads"].values():
        kinds = {(arm["concurrency"], arm["batching"], arm["prefix_reuse"]) for arm in entry["arms"]}
        assert len(kinds) == 8
        assert len({arm["total_output_tokens"] for arm in entry["arms"]}) == 1
        assert all((arm["cached_tokens"] > 0) == arm["prefix_reuse"] for arm in entry["arms"])
    assert "| 4 | continuous | on |" in (tmp_path / "engine.md").read_text()


@pytest.mark.slow
def test_a_small_busy_benchmark(tiny: Tiny, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "busy.py"), "--model", str(tiny("llama")), "--pairs", "2"]
    command += ["--concurrency", "2", "--prompt", "8", "--output", "16", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    report = json.loads((tmp_path / "busy.json").read_text())
    assert done.returncode == (0 if report["passed"] else 1), done.stderr
    assert len(report["pairs"]) == 2
    assert all(
        pair["ratio"] == pair["busy"]["output_throughput"] / pair["idle"]["output_throughput"]
        for pair in report["pairs"]
    )
    assert report["provenance"]["kind"] == "measured"
