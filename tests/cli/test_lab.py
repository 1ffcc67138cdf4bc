"""``tuili bench machine|monitor``, ``tuili plan``: options, clean JSON, files and exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tuili.base import limits
from tuili.models.checkpoint import open_checkpoint
from tuili.models.weights import weight_files

if TYPE_CHECKING:
    from conftest import Invoke
    from tiny_models import Tiny


def test_machine(tuili: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "machine.json"
    words = ("bench", "machine", "--threads", "1,2", "--seconds", "0.001", "--save-result", file)
    result = tuili(*words, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads(file.read_text())
    found = limits.load(file, threads=1)
    assert found.memory_bandwidth > 1e7
    assert set(found.peaks) == {"float32", "bfloat16", "int8"}
    assert all(rate > 1e8 for rate in found.peaks.values())
    table = tuili(*words, env={"COLUMNS": "150"}).stdout
    for part in ("read 256 MiB", "write", "copy", "bfloat16 (torch.mm)", "1 thread", "2 threads"):
        assert part in table


@pytest.mark.skipif(sys.platform != "linux", reason="the monitor reads /proc")
def test_monitor_of_a_command(tuili: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    words = ("bench", "monitor", "--output", file, "--interval", "0.05", "--")
    result = tuili(*words, sys.executable, "-c", "import sys, time; time.sleep(0.3); sys.exit(3)")
    assert result.exit_code == 3, result.output
    assert "peak memory" in result.stderr
    assert len(file.read_text().splitlines()) >= 3
    missing = tuili(*words, "no-such-command-of-ours")
    assert "cannot run 'no-such-command-of-ours'" in str(missing.exception)


def test_throughput_and_latency_are_monitored(tuili: Invoke, tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    words = ("--model", tiny("llama"), "--threads", 1, "--json", "--monitor", file)
    result = tuili("bench", "latency", *words, "--num-iters", 1, "--input-len", 4, "--output-len", 4)
    assert result.exit_code == 0, result.output
    assert json.loads(file.read_text().splitlines()[-1])["process"]["rss"] > 1 << 20
    file.unlink()
    sizes = ("--num-prompts", 2, "--max-len", 64, "--concurrency", 1, "--repeats", 1)
    assert tuili("bench", "throughput", *words, *sizes).exit_code == 0
    assert json.loads(file.read_text().splitlines()[0])["kind"] == "monitor"


def test_plan_memory(tuili: Invoke, tiny: Tiny) -> None:
    path = tiny("gemma2")
    words = ("plan", "memory", path, "--context", 100, "--concurrency", 3)
    result = tuili(*words, "--dtype", "float32,int4", "--kv-cache-dtype", "bfloat16", "--json")
    assert result.exit_code == 0, result.output
    plain, coded = json.loads(result.stdout)["plans"]
    # 100 positions are 7 blocks of 16; 4 layers, K and V of 2 heads of 32 in bfloat16; windows of 8 in two layers.
    assert (plain["kv_request"], plain["kv"]) == (7 * 16 * 4 * 2 * 2 * 32 * 2, 3 * plain["kv_request"])
    assert plain["kv_window"] == (8 + 100 + 8 + 100) * 2 * 2 * 32 * 2
    assert plain["total"] == plain["weights"] + plain["kv"] + plain["activations"]
    assert coded["weights"] < plain["weights"] / 3
    assert plain["fits"]
    # The same from config.json alone.
    alone = tuili("plan", "memory", path / "config.json", "--dtype", "float32", "--context", 100, "--json")
    assert json.loads(alone.stdout)["plans"][0]["weights"] == plain["weights"]
    table = tuili(*words, env={"COLUMNS": "150"}).stdout
    for part in ("weights", "KV cache", "within its windows", "int4 g32", "most requests"):
        assert part in table


def test_plan_memory_is_close_to_the_files(tuili: Invoke, tiny: Tiny) -> None:
    path = tiny("qwen3")
    got = json.loads(tuili("plan", "memory", path, "--dtype", "float32", "--json").stdout)["plans"][0]
    files = sum(file.stat().st_size for file in weight_files(open_checkpoint(path).path))
    assert 0 <= files - got["weights"] < 8192  # the files' headers


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("no/where/here",), "no directory or config.json"),
        (("embedded", "--dtype", "int5"), "unknown width 'int5'"),
        (("embedded", "--context", 10**9), "this model was made for"),
        (("embedded", "--kv-cache-dtype", "int3"), "unknown KV dtype"),
        (("embedded", "--dtype", "int4", "--group", 48), "48"),
    ],
)
def test_plan_memory_refuses(tuili: Invoke, words: tuple[object, ...], why: str) -> None:
    result = tuili("plan", "memory", *words)
    assert result.exit_code == 1
    assert why in str(result.exception)
