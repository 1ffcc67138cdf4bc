"""`make gpu-check` without a card: its bookkeeping by hand, its pieces at tiny sizes through Triton's interpreter."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tuili import ops
from tuili.ops import triton

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
needs_triton = pytest.mark.skipif(not triton.describe().usable, reason=triton.describe().why)

if TYPE_CHECKING:
    from gpu.place import Place


@pytest.fixture(autouse=True, scope="module")
def gpu() -> None:
    """The package is imported, but its folder is not left on the path (see test_rivals)."""
    sys.path.insert(0, str(BENCHMARKS))
    importlib.import_module("gpu")
    sys.path.remove(str(BENCHMARKS))


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = BENCHMARKS / "gpu" / "check.py"
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=280)


def test_it_refuses_where_there_is_no_card() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    done = check()
    assert done.returncode == 2
    assert "needs an NVIDIA GPU" in done.stdout


# A piece's notes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Callable[..., Place]:
    from gpu.place import Place

    return lambda **more: Place("cpu", True, tmp_path / "piece.json", **more)


def test_what_fails_is_noted_and_the_rest_goes_on(place: Callable[..., Place]) -> None:
    from gpu.place import LeftOut

    def too_large() -> None:
        raise LeftOut("no room")

    here = place()
    here.attempt("bad", lambda: {}["key"])
    here.attempt("large", too_large)
    here.attempt("good", lambda: {"value": 3})
    noted = json.loads(here.path.read_text())
    assert [noted[name]["status"] for name in ("bad", "large", "good")] == ["failed", "left out", "done"]
    assert noted["good"]["value"] == 3
    assert "KeyError: 'key'" in noted["bad"]["error"]
    assert "Traceback" in noted["bad"]["trace"]


def test_a_piece_that_died_goes_on_behind_where_it_died(place: Callable[..., Place]) -> None:
    from gpu.place import RUNNING

    here, calls = place(), []
    here.attempt("one", lambda: calls.append(1))
    here._note("two", {"status": RUNNING})  # and the process is gone
    again = place()
    for name in ("one", "two", "three"):
        again.attempt(name, lambda name=name: calls.append(name))
    assert calls == [1, "three"]
    assert again.entries["two"]["status"] == "failed"


def test_nothing_begins_behind_the_deadline(place: Callable[..., Place]) -> None:
    here = place(deadline=time.monotonic() - 1)
    here.attempt("late", lambda: {"value": 1})
    assert here.entries["late"]["status"] == "left out"


# The driver -----------------------------------------------------------------------------------------------------------


def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, names: list[str], seconds: float) -> Any:
    """Pieces ``names`` as the program ``body``, which gets the arguments of check.py, runs them."""
    from gpu import driver
    from gpu.pieces import Piece

    program = tmp_path / "program.py"
    program.write_text("import json, os, sys, time\nname, out = sys.argv[2], sys.argv[4]\n" + body)
    monkeypatch.setattr(driver, "CHECK", program)
    monkeypatch.setattr(driver, "LEAST_SECONDS", 0.1)
    made = driver.Driver(tmp_path / "out", tiny=False, budget=seconds)
    made.run([Piece(name, print, 5) for name in names])
    return made, json.loads((tmp_path / "out" / "check.json").read_text())["pieces"]


def test_a_piece_that_dies_is_recorded_and_the_next_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """
if name == "broken":
    sys.exit("what is wrong")
json.dump({"e": {"status": "done"}}, open(out, "w"))
"""
    made, pieces = drive(tmp_path, monkeypatch, body, ["broken", "right"], 60)
    assert pieces["broken"]["status"] == "failed"
    assert "what is wrong" in pieces["broken"]["why"]
    assert pieces["right"] == {**pieces["right"], "status": "done", "entries": {"e": {"status": "done"}}}
    assert made.failures() == ["broken"]


def test_a_lost_card_s_process_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """
entries = json.load(open(out)) if os.path.exists(out) else {}
entries[str(len(entries))] = {"status": "done"}
json.dump(entries, open(out, "w"))
sys.exit(75 if len(entries) < 3 else 0)
"""
    _, pieces = drive(tmp_path, monkeypatch, body, ["poisoned"], 60)
    assert pieces["poisoned"]["status"] == "done"
    assert list(pieces["poisoned"]["entries"]) == ["0", "1", "2"]


def test_a_piece_that_hangs_is_stopped_and_the_rest_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "json.dump({'first': {'status': 'done'}, 'second': {'status': 'running'}}, open(out, 'w'))\ntime.sleep(60)\n"
    made, pieces = drive(tmp_path, monkeypatch, body, ["hangs", "last"], 1.0)
    assert pieces["hangs"]["status"] == "failed"
    assert pieces["hangs"]["entries"]["first"]["status"] == "done"
    assert pieces["hangs"]["entries"]["second"]["status"] == "failed"
    assert pieces["last"]["status"] == "left out"
    assert made.failures() == ["hangs", "hangs: second"]


def test_pieces_can_have_runs_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "json.dump({'e': {'status': 'done'}}, open(out, 'w'))\n"
    drive(tmp_path, monkeypatch, body, ["one"], 60)
    _, pieces = drive(tmp_path, monkeypatch, body, ["two"], 60)
    assert list(pieces) == ["one", "two"]
    path = tmp_path / "out" / "check.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "versions": {"torch": "another"}}))
    _, pieces = drive(tmp_path, monkeypatch, body, ["three"], 60)
    assert list(pieces) == ["three"]


# What it measures -----------------------------------------------------------------------------------------------------


@needs_triton
def test_it_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch, place: Callable[..., Place]) -> None:
    from gpu import operations

    softcap = ops.table["softcap"]
    here = place()
    here.attempt("right", lambda: operations.check(softcap, triton.FAST, softcap.samples(), "cpu"))
    monkeypatch.setitem(softcap.implementations, triton.FAST, lambda x, cap: softcap.reference(x, cap) * 1.5)
    monkeypatch.setitem(softcap.implementations, triton.INVARIANT, lambda x, cap: x.nothing)
    for backend in (triton.FAST, triton.INVARIANT):
        here.attempt(backend, lambda b=backend: operations.check(softcap, b, softcap.samples(), "cpu"))
    assert here.entries["right"]["samples"] == len(softcap.samples())
    assert "off by" in here.entries[triton.FAST]["error"]
    assert "AttributeError" in here.entries[triton.INVARIANT]["error"]


def test_steady_speed_counts_steps_in_which_all_decode() -> None:
    from gpu.speed import Decode, steady

    # Both have a token at 2.0; the first ends at 6.0. Between: three steps of two tokens.
    steps = [(0.0, 0, 0), (1.0, 1, 0), (2.0, 2, 0), (3.0, 2, 0), (4.0, 2, 0), (5.0, 2, 0), (6.0, 2, 1), (7.0, 1, 1)]
    assert steady(steps, Decode(2, 8, 6)) == (2.0, 1.0)


def test_shapes_are_those_of_the_models() -> None:
    from gpu.shapes import spec_of

    from tuili.layers.sizes import parameter_count

    # As their model cards say: 8.03 and 0.596 billion (the tied head counted once).
    assert parameter_count(spec_of("Llama-3.1-8B", False)) == pytest.approx(8.03e9, rel=1e-3)
    assert parameter_count(spec_of("Qwen3-0.6B", False)) == pytest.approx(0.596e9, rel=1e-3)


def test_shares_are_of_the_tighter_limit() -> None:
    from gpu.report import Limits, markdown, speeds

    found = {
        "tiny": False,
        "provenance": {"date": "2026-01-01", "commit": None, "versions": {"torch": "0"}},
        "versions": {"card": "Some Card"},
        "pieces": {
            "peaks": piece(copy={"value": 1e12}, bfloat16={"value": 1e14}),
            "8b-bf16": {
                **piece(
                    # 10 GB a step: 10 ms at least; 8 tokens in 20 ms.
                    **{"decode 8 x 128+128": {"requests": 8, "tokens_per_second": 400.0, "bytes": 1e10,
                                              "operations": 1e11, "whole_tokens_per_second": 300.0}},
                    # 1e14 operations: a second at least; 1,000 tokens in four.
                    **{"prefill 1000": {"tokens_per_second": 250.0, "bytes": 1e10, "operations": 1e14}},
                ),
                "arm": {"model": "Llama-3.1-8B", "width": "bf16"},
            },
            "transformers-continuous": piece(
                **{"continuous batching 8 x 128+128": {"tokens_per_second": 90.0, "whole_tokens_per_second": 100.0}}
            ),
            "late": {"status": "left out", "why": "the budget was spent", "seconds": 0.0, "entries": {}},
        },
    }  # fmt: skip
    shares = {speed.scenario: speed.share for speed in speeds(found, Limits.of(found))}
    assert shares == {"decode 8 x 128+128": pytest.approx(0.5), "prefill 1000": pytest.approx(0.25)}
    text = markdown(found)
    assert "400 (50%)" in text
    assert "from start to end: 3.00 x continuous batching" in text
    assert "- late: the budget was spent" in text


def piece(**entries: Any) -> dict[str, Any]:
    entries = {name: {"status": "done", "seconds": 1.0, **entry} for name, entry in entries.items()}
    return {"status": "done", "seconds": 1.0, "entries": entries}


@needs_triton
def test_a_tiny_run_makes_all_files(tmp_path: Path) -> None:
    done = check("--tiny", "--only", "peaks,ops-1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "check.json").read_text())
    assert {name: piece["status"] for name, piece in found["pieces"].items()} == {"ops-1": "done", "peaks": "done"}
    assert found["provenance"]["kind"] == "measured"
    assert "these figures mean nothing" in (tmp_path / "check.md").read_text()


# Tuning ---------------------------------------------------------------------------------------------------------------


@needs_triton
def test_tuning_keeps_the_fastest_writes_it_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu import tune

    from tuili.ops.triton import tuning

    known = tuning.CardTiles("")
    monkeypatch.setattr(tuning, "card", lambda name: known)
    todo = tune.jobs(tiny=True)
    tried: list[Any] = []

    def timer(call: Callable[[], Any]) -> float:
        """The third candidate of each job is the fastest, and the first does not run."""
        tried.append(call)
        count = sum(call is other for other in tried)
        if count == 1:
            raise RuntimeError("out of resource")
        return abs(count - 3)

    assert tune.tune(todo, "cpu", tmp_path, time.monotonic() - 1, timer) == len(todo)
    assert not tried
    assert tune.tune(todo[:3], "cpu", tmp_path, time.monotonic() + 60, timer) == 0
    path = tmp_path / "interpreted.json"
    held = tuning.load(path)
    for job in todo[:3]:
        entries: dict[str, Any] = {**held.entries, **held.attention}
        assert entries[tune._key(job)][job.count] == tune.candidates(job)[2]
    assert tune.undone(todo, path) == todo[3:]


@needs_triton
def test_every_candidate_is_a_tile_that_the_kernels_take() -> None:
    """Sides that tensor cores multiply and that tiles of packed weights and blocks of scales are made of."""
    from gpu import tune

    for job in tune.jobs(tiny=False):
        tiles = tune.candidates(job)
        assert tiles[0] == tune.guess(job)
        for tile in tiles:
            sides = (tile.outputs, tile.rows, tile.inputs) if job.phase == "product" else (tile.rows, tile.keys)
            assert all(side >= 16 and side & (side - 1) == 0 for side in sides), (job, tile)
            assert job.phase != "product" or (tile.outputs % 64 == 0 and 128 % tile.inputs == 0), (job, tile)
