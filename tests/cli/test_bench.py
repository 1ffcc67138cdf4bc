"""``tuili bench``: options to workloads, clean JSON, files, exit codes; figures are held in tests/bench."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from fake_server import FakeServer, running

from tuili.base.errors import ConfigError

if TYPE_CHECKING:
    from conftest import Invoke
    from tiny_models import Tiny


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A fake server in a thread of its own."""
    fake, ready, stop = FakeServer(first=0.03, gap=0.002), threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def main() -> None:
        async with running(fake):
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    ready.wait(10)
    yield fake
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()


def test_json_is_clean_and_the_file_is_the_same(tuili: Invoke, server: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "result.json"
    result = tuili(
        *("bench", "serve", "--base-url", server.url, "--num-prompts", 6, "--max-concurrency", 2, "--repeats", 2),
        *("--random-input-len", "10-20", "--random-output-len", 5, "--save-result", file, "--save-detailed", "--json"),
    )
    assert result.exit_code == 0, result.output
    got = json.loads(result.stdout)
    assert got == json.loads(file.read_text())
    assert (got["completed"], got["failed"], got["max_concurrency"], got["request_rate"]) == (12, 0, 2, "inf")
    assert got["model_id"] == "fake"
    assert got["output_throughput_ci95"] is not None
    assert len(got["ttfts"]) == 12
    assert got["provenance"]["kind"] == "measured"
    assert all(10 <= len(body["prompt"]) <= 20 for body in server.bodies[1:])


def test_a_result_that_cannot_be_written_is_shown(tuili: Invoke, server: FakeServer, tmp_path: Path) -> None:
    words = ("bench", "serve", "--base-url", server.url, "--num-prompts", 2, "--save-result", tmp_path, "--json")
    result = tuili(*words)
    assert json.loads(result.stdout)["completed"] == 2
    assert f"cannot write the result to {tmp_path}" in str(result.exception)


@pytest.mark.parametrize(
    "words",
    [
        *(("serve", "--timeout", value) for value in ("nan", "inf", "0")),
        *(("serve", "--burstiness", value) for value in ("nan", "inf")),
        ("serve", "--shared-prefix", "nan"),
        ("machine", "--seconds", "nan"),
        ("kernels", "--seconds", "inf"),
        ("allocation", "--slack", "nan"),
        ("monitor", "--interval", "nan", "--", "true"),
    ],
)
def test_numbers_that_are_none_are_usage_errors(tuili: Invoke, words: tuple[str, ...]) -> None:
    result = tuili("bench", *words)
    assert result.exit_code == 2
    assert words[1] in result.output


@pytest.mark.parametrize("value", ["nan", "0", "-1", "-inf"])
def test_a_rate_is_positive(tuili: Invoke, server: FakeServer, value: str) -> None:
    result = tuili("bench", "serve", "--base-url", server.url, "--request-rate", value)
    assert "must be positive" in str(result.exception)


@pytest.mark.parametrize(
    "words", [("kernels", "--rows", "²"), ("kernels", "--size", "²x4"), ("machine", "--threads", "9" * 5000)]
)
def test_digits_that_are_no_numbers_are_named(tuili: Invoke, words: tuple[str, ...]) -> None:
    assert isinstance(tuili("bench", *words).exception, ConfigError)


def test_goodput_as_vllm_spells_it(tuili: Invoke, server: FakeServer) -> None:
    words = ("bench", "serve", "--base-url", server.url, "--num-prompts", 3, "--max-concurrency", 1, "--json")
    got = json.loads(tuili(*words, "--goodput", "ttft:20", "tpot:5000", "e2el:5000").stdout)
    assert got["goodput_limits_ms"] == {"ttft": 20.0, "tpot": 5000.0, "e2el": 5000.0}
    assert got["request_goodput"] == 0.0
    got = json.loads(tuili(*words, "--goodput", "ttft:5000 tpot:5000").stdout)
    assert got["request_goodput"] == pytest.approx(got["request_throughput"])


def test_the_table_has_the_figures(tuili: Invoke, server: FakeServer) -> None:
    result = tuili("bench", "serve", "--base-url", server.url, "--num-prompts", 3, env={"COLUMNS": "120"})
    assert result.exit_code == 0
    for part in ("TTFT", "TPOT", "ITL", "E2EL", "median", "p99", "output throughput"):
        assert part in result.stdout


def test_datasets(tuili: Invoke, server: FakeServer, tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 600, "output_length": 3, "hash_ids": [0, 1]}\n' * 3)
    words = ("bench", "serve", "--base-url", server.url, "--num-warmups", 0, "--json")
    got = json.loads(tuili(*words, "--dataset", "mooncake", "--trace", trace, "--trace-shrink", 8).stdout)
    assert got["total_input_tokens"] == 3 * 75
    assert server.bodies[0]["prompt"] == server.bodies[1]["prompt"]
    got = json.loads(tuili(*words, "--dataset", "preset", "--preset", "mixed", "--num-prompts", 4).stdout)
    assert got["provenance"]["workload"]["name"] == "preset-mixed"
    missing = tuili(*words, "--dataset", "azure")
    assert missing.exit_code == 1
    assert "--trace FILE" in str(missing.exception)


def test_all_failed_is_an_error_that_says_why(tuili: Invoke, server: FakeServer) -> None:
    server.refuse = lambda index: (400, '{"error": {"message": "no such thing"}}')
    result = tuili("bench", "serve", "--base-url", server.url, "--num-prompts", 3, "--json")
    assert result.exit_code == 1
    assert "all 3 requests failed" in str(result.exception)
    assert "no such thing" in str(result.exception)
    assert json.loads(result.stdout)["failed"] == 3


def test_throughput_in_process(tuili: Invoke, tiny: Tiny) -> None:
    result = tuili(
        *("bench", "throughput", "--model", tiny("llama"), "--concurrency", "1,4", "--num-prompts", 6, "--repeats", 2),
        *("--max-len", 96, "--threads", 1, "--scheduling-policy", "static", "--no-enable-prefix-caching", "--json"),
    )
    assert result.exit_code == 0, result.output
    got = json.loads(result.stdout)
    assert [arm["concurrency"] for arm in got["arms"]] == [1, 4]
    for arm in got["arms"]:
        assert arm["completed"] == 12
        assert arm["cached_tokens"] == 0
        assert arm["config"]["scheduling_policy"] == "static"
        assert arm["config"]["max_num_seqs"] == arm["concurrency"]


def test_latency_in_process(tuili: Invoke, tiny: Tiny) -> None:
    words = ("bench", "latency", "--model", tiny("llama"), "--batch-size", "1,2", "--num-iters", 2, "--threads", 1)
    result = tuili(*words, "--num-iters-warmup", 1, "--input-len", 4, "--output-len", 6, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert "host ms" in result.stdout
    assert tuili("bench", "latency", "--batch-size", "x").exit_code == 1
