"""The rival harness without any rival: protocol with a made-up worker, figures by hand, report of made-up records."""

from __future__ import annotations

import importlib
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True, scope="module")
def rivals() -> None:
    """The package is imported, but its folder is not left on the path: transformers would take kernels.py there for a
    package that it knows."""
    sys.path.insert(0, str(BENCHMARKS))
    importlib.import_module("rivals")
    sys.path.remove(str(BENCHMARKS))


def test_decode_speed_counts_tokens_while_all_requests_decode() -> None:
    from rivals.scenarios import Scenario

    first = [(7, 1.0), (7, 2.0), (7, 3.0), (7, 4.0)]
    second = [(7, 2.0), (7, 3.0), (7, 4.0), (7, 5.0)]
    # From 2.0 (both have begun) to 4.0 (one has ended): tokens at 3.0 and 4.0 of both.
    assert Scenario("d", 2, 8, 4).speed([first, second]) == pytest.approx(4 / 2.0)


def test_decode_speed_refuses_requests_that_ran_one_after_the_other() -> None:
    from rivals.scenarios import Scenario

    with pytest.raises(ValueError, match="never decoded all together"):
        Scenario("d", 2, 8, 2).speed([[(1, 1.0), (1, 2.0)], [(1, 3.0), (1, 4.0)]])


def test_prefill_speed_is_prompt_over_the_first_token() -> None:
    from rivals.scenarios import Scenario

    assert Scenario("p", 1, 512, 1, fresh=True).speed([[(7, 2.0)]]) == 256.0


def test_prompts_are_the_same_for_every_arm_and_fresh_where_a_cache_could_answer() -> None:
    from rivals.scenarios import FULL

    decode, prefill = FULL[1], FULL[3]
    assert decode.prompts(1000, "0.0") == decode.prompts(1000, "4.2")
    assert prefill.prompts(1000, "0.0") == prefill.prompts(1000, "0.0") != prefill.prompts(1000, "0.1")
    assert all(300 <= id < 1000 for prompt in decode.prompts(1000, "0.0") for id in prompt)


def test_weights_of_the_shapes_are_those_of_the_models() -> None:
    from rivals.shapes import SHAPES, sizes

    for name, millions in {"qwen3-0.6b": 596, "llama3.2-1b": 1236, "llama15m": 15.2}.items():
        shape = SHAPES[name]
        matrices = sum(size[0] * size[1] for _, size in sizes(shape) if len(size) == 2)
        assert matrices == shape.body + shape.head
        assert matrices / 1e6 == pytest.approx(millions, rel=0.005)


def test_checkpoint_opens_in_transformers_and_every_id_has_a_text(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from rivals.shapes import Shape, write

    shape = Shape("tiny", "qwen3", 64, 2, 4, 2, 16, 96, 512, 1e6, 1.0)
    write(shape, tmp_path / "tiny")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tiny")
    assert model.num_parameters() > shape.body + shape.head
    assert len(tokenizer) == shape.vocab
    assert all(tokenizer.decode([id]) for id in range(3, shape.vocab))
    assert tokenizer.decode(tokenizer("abba 1").input_ids) == "abba 1"


WORKER = """
    import json, os, sys, time
    print(json.dumps({"ready": time.time()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["new"] == 9:
            print(json.dumps({"error": "nine is too many"}), flush=True)
        elif request["new"] == 8:
            os._exit(3)
        else:
            made = request["new"] - (request["new"] == 7)
            print(json.dumps({"timed": [[[5, 0.1]] * made for _ in request["prompts"]]}), flush=True)
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Any]:
    from rivals.protocol import Worker

    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(WORKER))
    made = Worker([sys.executable, str(script)], {}, tmp_path / "log")
    yield made
    made.close()


def test_worker_answers_and_sleeps_between_turns(worker: Any) -> None:
    assert worker.start_seconds > 0
    assert [len(row) for row in worker.generate([[1], [2]], 3)] == [3, 3]
    deadline = time.monotonic() + 5
    while worker.processes()[0].status() != "stopped":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert worker.peak_memory() > 1 << 20


@pytest.mark.parametrize(("new", "why"), [(9, "nine is too many"), (8, "exit status 3"), (7, "asked for 7 tokens")])
def test_worker_that_fails_says_why(worker: Any, new: int, why: str) -> None:
    from rivals.rival import Unavailable

    with pytest.raises(Unavailable, match=why):
        worker.generate([[1]], new)


def test_the_real_worker_reports_what_it_cannot_load(tmp_path: Path) -> None:
    from rivals.protocol import WORKER, Worker
    from rivals.rival import Unavailable

    command = [sys.executable, str(WORKER), "tuili", "bf16", str(tmp_path / "nothing"), "1"]
    with pytest.raises(Unavailable, match="nothing"):
        Worker(command, {}, tmp_path / "log")


def test_step_of_an_installation_that_fails_gives_its_last_line(tmp_path: Path) -> None:
    from rivals.rival import Unavailable, shell

    with pytest.raises(Unavailable, match="no such wheel"):
        shell([sys.executable, "-c", "raise SystemExit('no such wheel')"], tmp_path / "install.log")


def test_results_hide_folders_of_the_machine_and_survive_a_torn_line(tmp_path: Path) -> None:
    from rivals.results import Results

    results = Results(tmp_path / "raw.jsonl", {tmp_path: "CACHE"})
    results.add("start", model="m", arm="a", command=[f"{tmp_path}/python"])
    with results.path.open("a") as file:
        file.write('{"kind": "sp')
    again = Results(results.path)
    assert again.of("start", model="m") == [{"kind": "start", "model": "m", "arm": "a", "command": ["CACHE/python"]}]


def test_arms_are_chosen_by_the_beginning_of_their_names() -> None:
    from rivals.arms import arms, side_by_side

    assert [arm.name for arm in arms(["tuili bf16", "openvino"])] == [
        "tuili bf16", "openvino fp16", "openvino int8", "openvino int4",
    ]  # fmt: skip
    assert [{arm.width.group for arm in group} for group in side_by_side(arms([]))] == [
        {"16 bit"}, {"8 bit"}, {"4 bit"},
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no arm is called 'gpt'"):
        arms(["gpt"])


def test_time_is_divided_by_shares_and_the_rest_evenly() -> None:
    from rivals.run import part, rotated
    from rivals.shapes import SHAPES

    arm: Any = object()
    work = [(SHAPES["qwen3-0.6b"], [arm] * 3), (SHAPES["qwen3-0.6b"], [arm]), (SHAPES["llama3.2-1b"], [arm])]
    assert [part(work, at) for at in range(3)] == [0.75, 1.0, 1.0]
    assert rotated([1, 2, 3], 4) == [2, 3, 1]  # type: ignore[list-item]


def records() -> list[dict[str, Any]]:
    def arm(name: str, bits: float, **more: Any) -> dict[str, Any]:
        rival, width = name.split()
        return {"kind": "arm", "model": "llama15m", "arm": name, "rival": rival, "width": width, "bits": bits, **more}

    def speed(name: str, scenario: str, round_: int, value: float, **more: Any) -> dict[str, Any]:
        about = {"kind": "speed", "model": "llama15m", "arm": name, "scenario": scenario, "round": round_}
        return {**about, "tokens_per_second": value, "others": 0.0, **more}

    origin = {"date": "d", "machine": {"cpu": "CPU"}, "commit": {"id": "0123456789abcdef", "dirty": False}}
    return [
        {"kind": "run", **origin},
        {"kind": "machine", "threads": 2, "bandwidth": {"2": 60e9}, "peaks": {"bf16": 9e11, "int8": 18e11}},
        arm("tuili bf16", 16, versions={"tuili": "0"}),
        arm("rival bf16", 16, versions={"rival": "1"}),
        arm("rival int8", 8, versions={"rival": "1"}),
        arm("other int4", 4, reason="no wheel for this machine"),
        *[speed("tuili bf16", "decode 1", i, v, bandwidth=50e9) for i, v in enumerate((900.0, 1000.0, 5000.0))],
        *[speed("rival bf16", "decode 1", i, v, bandwidth=50e9) for i, v in enumerate((400.0, 500.0, 600.0))],
        speed("rival int8", "decode 1", 0, 800.0, bandwidth=50e9, others=0.5),
        {"kind": "start", "model": "llama15m", "arm": "tuili bf16", "seconds": 1.25},
        {"kind": "memory", "model": "llama15m", "arm": "tuili bf16", "bytes": 300 << 20},
        {"kind": "agreement", "model": "llama15m", "arm": "tuili bf16", "agree": 15, "of": 16},
    ]


def test_report_gives_medians_shares_ratios_and_reasons() -> None:
    from rivals.report import markdown, rows
    from rivals.shapes import SHAPES

    shape = SHAPES["llama15m"]
    ours = rows(records(), "llama15m")[0]
    limit = 50e9 / (2 * (shape.body + shape.head))
    assert (ours.speeds["decode 1"].value, ours.speeds["decode 1"].rounds) == (1000.0, 3)
    assert ours.speeds["decode 1"].share == pytest.approx(1000.0 / limit)
    text = markdown(records())
    assert f"| **tuili bf16** | 1,000 ({1000 / limit:.0%}) | - | - | - | - | 1.2 | 300 | 15/16 | 3 |" in text
    assert "2.00 (rival bf16), 1.25 (rival int8)" in text
    assert "800*" in text
    assert "- other int4: no wheel for this machine" in text


def test_limit_is_memory_for_one_row_and_products_for_a_prompt() -> None:
    from rivals.report import limit
    from rivals.scenarios import FULL
    from rivals.shapes import SHAPES

    shape, peaks = SHAPES["qwen3-0.6b"], {"bf16": 9e11, "int8": 19e11}
    one, prefill = FULL[0], FULL[3]
    assert limit(shape, 16, one, 75e9, peaks) == pytest.approx(63, rel=0.01)
    assert limit(shape, 8, prefill, 75e9, peaks) == pytest.approx(2150, rel=0.03)
    assert limit(shape, 4.5, prefill, 75e9, peaks) == limit(shape, 8, prefill, 75e9, peaks), "older results"
    assert limit(shape, 4.5, prefill, 75e9, peaks | {"int4": 38e11}) == pytest.approx(4300, rel=0.03)


def test_report_of_nothing_and_of_a_run_without_speeds(tmp_path: Path) -> None:
    from rivals.report import write

    assert "Nothing was measured yet" in write([], tmp_path)
    assert "- tuili bf16: not measured yet" in write(records()[:4], tmp_path)
    assert not (tmp_path / "rivals.png").exists()


def test_plot_is_written_where_matplotlib_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from rivals.report import write

    write(records(), tmp_path)
    assert (tmp_path / "rivals.png").stat().st_size > 10_000
