"""Workloads are the same everywhere for the same seed, and have the lengths, prefixes and arrivals that were asked
for."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tuili.base.errors import ConfigError
from tuili.bench import traces
from tuili.bench.workload import PRESETS, Span, Workload, fixed_random, poisson, preset

#: Computed once and written down: a change here changes every published number's workload.
GOLDEN = {
    "random": "0219f38268a65ea232c1eaf74ce68c368347293b780376ef699d19fb63f0085d",
    "chat": "8b71fcd676b7b2e392ae7c488b3aa7ded9577a23adaf14a57bb876fb235e5d9f",
    "batch": "e33a19c759964be689065e1aeec7b22b9156b2ab831b2df7a129618d3c5a5cf8",
    "mixed": "b401b2d8d9f71f2f8a14c83adaaffdb0cbdc8e79534d342d3e4e02861abee512",
}


def make(name: str, seed: int = 0) -> Workload:
    if name == "random":
        return fixed_random(20, Span(8, 64), Span(4, 16), seed=seed, shared_prefix=0.5)
    return preset(name, 20, seed=seed, max_len=256)


@pytest.mark.parametrize("name", GOLDEN)
def test_same_seed_same_bytes_for_ever(name: str) -> None:
    assert make(name).digest == GOLDEN[name]
    assert make(name).items == make(name).items
    assert make(name, seed=1).digest != make(name).digest


def test_no_dependence_on_the_process() -> None:
    code = "from tuili.bench.workload import *; print(preset('mixed', 20, max_len=256).digest)"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert seen == {GOLDEN["mixed"] + "\n"}


def test_lengths_are_what_was_asked() -> None:
    work = fixed_random(200, Span(10, 20), Span(3, 3))
    lengths = [len(item.tokens) for item in work.items]
    assert min(lengths) == 10
    assert max(lengths) == 20
    assert {item.max_tokens for item in work.items} == {3}
    assert work.input_tokens == sum(lengths)
    assert work.output_tokens == 600


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_shared_prefix_is_shared_by_all(share: float) -> None:
    items = fixed_random(50, Span(40, 40), Span(1, 1), shared_prefix=share).items
    least = min(common(a.tokens, b.tokens) for a, b in itertools.pairwise(items))
    assert least == pytest.approx(share * 40, abs=0 if share else 2)


def test_token_ids_stay_in_the_vocabulary() -> None:
    work = fixed_random(50, Span(40, 40), Span(1, 1), vocab=(5, 9))
    assert {token for item in work.items for token in item.tokens} == {5, 6, 7, 8}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("max_len", [48, 512, 4096])
def test_presets_fit_the_context(name: str, max_len: int) -> None:
    for item in preset(name, 300, max_len=max_len).items:
        assert item.max_tokens >= 1
        assert item.tokens
        assert len(item.tokens) + item.max_tokens <= max_len


def test_chat_turns_repeat_what_was_said() -> None:
    """Many prompts are an earlier prompt and more: that is what prefix reuse is for."""
    items = preset("chat", 100, max_len=1024).items
    longer = sum(any(common(a.tokens, b.tokens) > 140 for b in items[:i]) for i, a in enumerate(items))
    assert longer > 30


def test_text_keeps_prefixes() -> None:
    first, second = fixed_random(2, Span(20, 20), Span(1, 1), shared_prefix=0.5).items
    assert first.text.split()[:10] == second.text.split()[:10]
    assert len(first.text.split()) == 20


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (4.0, 0.5), (0.25, 2.0)])
def test_arrivals_have_the_rate_and_the_variation(burstiness: float, variation: float) -> None:
    """Gaps are gamma: mean 1/rate, coefficient of variation 1/sqrt(burstiness)."""
    work = poisson(fixed_random(4000, Span(1, 1), Span(1, 1)), 10.0, burstiness=burstiness)
    gaps = [b.arrival - a.arrival for a, b in itertools.pairwise(work.items)]
    mean = sum(gaps) / len(gaps)
    std = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert mean == pytest.approx(0.1, rel=0.1)
    assert std / mean == pytest.approx(variation, rel=0.1)


def test_an_infinite_rate_is_all_at_once() -> None:
    assert {item.arrival for item in poisson(preset("chat", 9), math.inf).items} == {0.0}


@pytest.mark.parametrize("text", ["", "x", "0", "9-3", "-5", "1-2-3"])
def test_bad_lengths_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match="length"):
        Span.parse(text)


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'chat'"):
        preset("chatt", 1)


MOONCAKE = """{"timestamp": 0, "input_length": 1000, "output_length": 10, "hash_ids": [0, 1]}
{"timestamp": 1500, "input_length": 1100, "output_length": 4, "hash_ids": [0, 1, 2]}
{"timestamp": 3000, "input_length": 700, "output_length": 4, "hash_ids": [0, 3]}
"""


def test_mooncake_rows_share_what_their_ids_share(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(MOONCAKE)
    work = traces.from_rows(traces.mooncake(file), name="t")
    first, second, third = work.items
    assert [len(item.tokens) for item in work.items] == [1000, 1100, 700]
    assert [item.arrival for item in work.items] == [0.0, 1.5, 3.0]
    assert common(first.tokens, second.tokens) == 1000  # block 1 is cut in the first row and whole in the second
    assert 512 <= common(first.tokens, third.tokens) < 520
    assert [item.max_tokens for item in work.items] == [10, 4, 4]


def test_a_shrunk_trace_keeps_its_share_of_prefixes(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(MOONCAKE)
    work = traces.from_rows(traces.mooncake(file), name="t", shrink=64, speed=2.0, max_len=20)
    assert work.skipped == 0 or len(work.items) + work.skipped == 3
    assert [len(item.tokens) for item in work.items] == [16, 18, 11]
    assert common(work.items[0].tokens, work.items[1].tokens) == 16
    assert work.items[2].arrival == 1.5


def test_rows_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(MOONCAKE)
    work = traces.from_rows(traces.mooncake(file), name="t", max_len=1010)
    assert len(work.items) == 2
    assert work.skipped == 1


@pytest.mark.parametrize(
    "text",
    [
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,48,10\n2023-11-16 18:17:04.0319600,31,8\n",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.009930+00:00,48,10\n2024-05-10 00:00:00.061930+00:00,31,8\n",
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,,,ChatGPT,48,10,58,Conversation log\n5.052,,,ChatGPT,31,8,39,Conversation log\n",
    ],
)
def test_csv_traces(text: str, tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(text)
    work = traces.from_rows(traces.azure(file), name="t")
    assert [(len(item.tokens), item.max_tokens) for item in work.items] == [(48, 10), (31, 8)]
    assert work.items[1].arrival == pytest.approx(0.052, abs=1e-5)


def test_a_broken_trace_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(MOONCAKE + '{"timestamp": 1}\n')
    with pytest.raises(ConfigError, match=r"trace\.jsonl:4"):
        list(traces.mooncake(file))
    with pytest.raises(ConfigError, match="columns"):
        list(traces.azure(file))
    with pytest.raises(ConfigError, match="cannot read"):
        list(traces.mooncake(tmp_path / "none"))
    file.write_bytes(b"TIMESTAMP,ContextTokens,GeneratedTokens\n\xff,1,1\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        list(traces.azure(file))
    file.write_text('{"timestamp": NaN, "input_length": 3, "output_length": 3, "hash_ids": []}\n')
    with pytest.raises(ConfigError, match=":1 is not a line"):
        list(traces.mooncake(file))


def test_the_real_traces_load(shared: Path) -> None:
    """Against the figures of interfaces.md 5.10: rows, mean lengths, blocks."""
    file = shared / "data/traces/mooncake/conversation_trace.jsonl"
    if not file.exists():
        pytest.skip(f"needs {file}")
    rows = list(traces.mooncake(file))
    assert len(rows) == 12_031
    assert sum(row.input_len for row in rows) == 144_793_823
    assert sum(len(row.hash_ids) for row in rows) == 288_500
    assert all(len(row.hash_ids) == -(-row.input_len // 512) for row in rows)
    azure = list(traces.azure(shared / "data/traces/azure2023/AzureLLMInferenceTrace_conv.csv"))
    assert azure[0] == traces.TraceRow(0.0, 374, 44)
    assert all(a.arrival <= b.arrival for a, b in itertools.pairwise(azure))
