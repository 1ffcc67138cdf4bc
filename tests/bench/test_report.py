"""The arithmetic of reports against numbers worked out by hand, and against numpy."""

from __future__ import annotations

import re
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuili.base import hardware
from tuili.base.errors import ConfigError
from tuili.base.hardware import Hardware
from tuili.bench.load import LoadRun, Record
from tuili.bench.provenance import command, provenance, results_folder
from tuili.bench.report import detail, failures, is_good, over_repeats, parse_goodput, sum_of_parts, summarize
from tuili.bench.statistics import ci95, mean, percentile, spread, std
from tuili.bench.workload import preset
from tuili.ops import cpu


def record(index: int, start: float, ttft: float, itls: list[float], tokens: int, **fields: object) -> Record:
    e2e = ttft + sum(itls)
    return Record(
        index,
        start,
        start,
        10,
        tokens,
        ttft=ttft,
        itls=itls,
        e2e=e2e,
        end=start + e2e,
        **fields,  # type: ignore[arg-type]
    )


def two_requests() -> LoadRun:
    """One lane, back to back: 100 ms + 4 gaps of 25 ms (5 tokens), then 300 ms + one gap of 100 ms carrying 2 tokens
    (3 tokens)."""
    first = record(0, 0.0, 0.1, [0.025] * 4, 5)
    second = record(1, 0.2, 0.3, [0.1], 3, cached_tokens=4)
    return LoadRun([first, second], duration=0.6, lanes=1, peak=1, live_seconds=0.6)


def test_every_figure_by_hand() -> None:
    got = summarize(two_requests(), {"ttft": 200.0, "tpot": 50.0})
    expected = {
        "completed": 2,
        "failed": 0,
        "total_input_tokens": 20,
        "total_output_tokens": 8,
        "cached_tokens": 4,
        "request_throughput": 2 / 0.6,
        "output_throughput": 8 / 0.6,
        "total_token_throughput": 28 / 0.6,
        "request_goodput": 1 / 0.6,  # the second waits 300 ms
        "mean_ttft_ms": 200.0,
        "median_ttft_ms": 200.0,
        "std_ttft_ms": 100.0,
        "p90_ttft_ms": 280.0,
        "p99_ttft_ms": 298.0,
        "mean_tpot_ms": (25.0 + 50.0) / 2,  # 100 ms / 4 and 100 ms / 2: by tokens, not by pieces
        "mean_itl_ms": (4 * 25.0 + 100.0) / 5,
        "median_itl_ms": 25.0,
        "mean_e2el_ms": 300.0,
        "std_e2el_ms": 100.0,
    }
    assert {key: got[key] for key in expected} == pytest.approx(expected)


def test_the_fields_are_those_of_vllm() -> None:
    """interfaces.md 5.10, last bullet (max_concurrency and request_rate belong to the run: see test_load)."""
    wanted = {"request_throughput", "output_throughput", "total_token_throughput", "request_goodput", "completed"}
    wanted |= {"total_input_tokens", "total_output_tokens", "duration"}
    wanted |= {f"{s}_{m}_ms" for s in ("mean", "median", "std", "p99") for m in ("ttft", "tpot", "itl", "e2el")}
    assert wanted <= set(summarize(two_requests()))
    assert {"input_lens", "output_lens", "ttfts", "itls", "errors"} <= set(detail(two_requests()))


def test_parts_add_up_to_the_wall() -> None:
    parts = sum_of_parts(two_requests())
    assert parts["first"] == pytest.approx(0.4)
    assert parts["decode"] == pytest.approx(0.2)
    assert parts["ratio"] == pytest.approx(1.0)


def test_failed_requests_count_as_failed_only() -> None:
    run = two_requests()
    run.records.append(Record(2, 0.0, 0.0, 10, error="HTTP 503: full"))
    got = summarize(run, {"ttft": 1000.0})
    assert (got["completed"], got["failed"]) == (2, 1)
    assert got["request_goodput"] == pytest.approx(2 / 0.6)
    assert got["mean_ttft_ms"] == pytest.approx(200.0)
    assert failures(run.records) == {"HTTP 503: full": 1}


def test_goodput_asks_for_all_limits() -> None:
    seen = record(0, 0.0, 0.1, [0.05, 0.05], 3)  # ttft 100, tpot 50, e2el 200
    assert is_good(seen, {"ttft": 100.0 + 1e-6, "tpot": 50.0 + 1e-6, "e2el": 200.0 + 1e-6})
    for name, limit in (("ttft", 99.0), ("tpot", 49.0), ("e2el", 199.0)):
        assert not is_good(seen, {"ttft": 1000.0, "tpot": 1000.0, "e2el": 1000.0, name: limit})
    assert is_good(record(0, 0.0, 0.1, [], 1), {"tpot": 0.001}), "one token has no TPOT"


def test_goodput_terms() -> None:
    assert parse_goodput(["ttft:200", "e2el:3e3"]) == {"ttft": 200.0, "e2el": 3000.0}
    for wrong in ("ttft", "ttft:x", "ttft:0", "itl:3", "speed:3"):
        with pytest.raises(ConfigError):
            parse_goodput([wrong])


def test_medians_and_intervals_over_repeats() -> None:
    runs = [summarize(two_requests()) | {"output_throughput": value} for value in (10.0, 12.0, 17.0)]
    got = over_repeats(runs)
    assert got["output_throughput"] == 12.0
    assert got["output_throughput_repeats"] == [10.0, 12.0, 17.0]
    # mean 13, s = sqrt(13), half width = 4.303 * sqrt(13) / sqrt(3)
    assert got["output_throughput_ci95"] == pytest.approx((13 - 8.9574, 13 + 8.9574), abs=1e-3)
    assert over_repeats(runs[:1])["output_throughput_ci95"] is None
    assert got["completed"] == 6


numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


@given(numbers, st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(numpy.percentile(values, percent), rel=1e-9, abs=1e-6)


@given(numbers)
def test_moments_are_numpys(values: list[float]) -> None:
    assert mean(values) == pytest.approx(numpy.mean(values), rel=1e-9, abs=1e-6)
    assert std(values) == pytest.approx(numpy.std(values), rel=1e-6, abs=1e-4)
    assert spread(values)["max"] == max(values)


def test_no_values_are_zeros_not_errors() -> None:
    assert set(spread([]).values()) == {0.0}
    assert ci95([1.0]) is None
    empty = summarize(LoadRun([Record(0, 0.0, 0.0, 1, error="x")], 1.0, 1, 1, 1.0))
    assert empty["p99_itl_ms"] == 0.0


def test_provenance_says_where_a_figure_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tuili", "bench", "--api-key", "secret", "--api-key=secret", "x"])
    assert "secret" not in command()
    got = provenance(preset("chat", 3))
    assert got["kind"] == "measured"
    assert got["machine"]["cores"] >= 1
    assert {"python", "torch", "tuili"} <= set(got["versions"])
    assert got["workload"]["sha256"] == preset("chat", 3).digest
    assert set(got) >= {"date", "commit", "config", "command"}


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        ("avx2 fma f16c", "amd-epyc-avx2"),
        ("avx2 fma f16c avx_vnni", "amd-epyc-avxvnni"),
        ("avx2 fma f16c avx512f avx512_vnni avx512_bf16", "amd-epyc-avx512"),
        ("avx2 fma f16c avx512f avx512_vnni", "amd-epyc-avx2"),  # what the kernels for AVX-512 need is not all there
        ("", "amd-epyc-riscv64"),
    ],
)
def test_results_of_machines_of_one_name_lie_apart(
    flags: str, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    here = Hardware("AMD EPYC", 2, frozenset(flags.split()), 1, 1)
    monkeypatch.setattr("tuili.base.hardware.probe", lambda: here)
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d-{kind}", results_folder(tmp_path).name)


def test_a_machine_is_named_by_the_kernels_that_run_on_it() -> None:
    if not cpu.describe().built:
        pytest.skip("the C++ kernels were not built")
    assert hardware.probe().vectors == cpu.describe().isa
