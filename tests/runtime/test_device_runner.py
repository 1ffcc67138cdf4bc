"""Steps on a device say what the engine on the CPU says: eager and captured, one and two in flight, at once or late."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from devices import AtOnce, Lagging, Strict
from equality import (
    BLOCK,
    ON_FP8_KV,
    ON_INT8_KV,
    SPECS,
    VOCAB,
    device_engine,
    drive,
    engine,
    load,
    model,
    naive,
    outputs,
    request,
)
from padded import NAME as PADDED

from tuili.base.clock import WallClock
from tuili.base.errors import EngineDead
from tuili.core.params import SamplingParams
from tuili.core.plan import BlockMove, Chunk, StepPlan
from tuili.core.request import FinishReason, Update
from tuili.engine.engine import Engine
from tuili.executors.local import LocalExecutor
from tuili.runtime.rows import Row
from tuili.runtime.rules import ordered_rules
from tuili.runtime.staging import Parcel, fetch
from tuili.runtime.step import FAILED

LOAD = load(7)
POOLS = {"tight": 15, "ample": 200}
DEVICES = pytest.mark.parametrize("device", [AtOnce, Lagging])
WAYS = pytest.mark.parametrize(("device", "depth"), [(AtOnce, 1), (Lagging, 2)], ids=["at once", "two, late"])
CPU = torch.device("cpu")


def greedy(
    name: str, device: Any, sizes: tuple[int, ...], depth: int, budget: int, blocks: int, backend: str = ""
) -> LocalExecutor:
    """Run the load, and hold it to the naive loop."""
    want = {str(i): naive(name, prompt, count) for i, (prompt, count) in enumerate(LOAD)}
    scheduler, executor = device_engine(name, device, sizes, budget=budget, blocks=blocks, backend=backend)
    for i, (prompt, count) in enumerate(LOAD):
        scheduler.add(request(str(i), prompt, max_tokens=count))
    assert outputs(drive(scheduler, executor, depth)) == want
    scheduler.check_integrity()
    assert (scheduler.preempted > 0) == (blocks == POOLS["tight"])
    return executor


@WAYS
@pytest.mark.parametrize(("budget", "pool"), [(6, "ample"), (512, "tight")])
@pytest.mark.parametrize("name", [*SPECS, *(f"{name}+kv8" for name in SPECS if "bf16" in name), *ON_FP8_KV])
def test_eager_steps_equal_the_naive_loop(name: str, budget: int, pool: str, depth: int, device: Any) -> None:
    greedy(name, device(), (), depth, budget, POOLS[pool])


@WAYS
@pytest.mark.parametrize("budget", [6, 512])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("name", [name for name in SPECS if "f32" in name])
def test_captured_steps_equal_the_naive_loop(name: str, pool: str, budget: int, depth: int, device: Any) -> None:
    """Steps of up to four rows are captured, in two sizes; those of five and six are eager."""
    executor = greedy(name, card := device(), (4, 2), depth, budget, POOLS[pool], PADDED)
    graphs = executor.runner.captured
    assert graphs is not None
    assert (graphs.shapes, graphs.why, card.captures) == ([(2, 1), (4, 1)], "", 2)
    assert card.replays > 5


STRICTLY = pytest.mark.parametrize(
    ("device", "depth"), [(Strict, 1), (Strict, 2), (Lagging, 2)], ids=["strict", "two, strict", "two, late"]
)
WISHES: list[dict[str, Any]] = [
    {"temperature": 0.8, "top_p": 0.9, "logprobs": 3},
    {"temperature": 1.2, "top_k": 12, "frequency_penalty": 0.5, "presence_penalty": 0.2},
    {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.2, "min_tokens": 3, "eos_token_ids": (3, 4, 5)},
    {"prompt_logprobs": 2, "logprobs": 0, "bad_words_ids": ((3,), (5, 6))},
    {"logit_bias": {7: 4.0, 9: -3.0}, "allowed_token_ids": tuple(range(0, VOCAB, 2)), "logprobs": -1},
]


def said(scheduler: Any, executor: Any, depth: int) -> dict[str, tuple[list, list, list]]:
    """Tokens, logprobs and prompt logprobs of requests with all kinds of wishes."""
    for i, (prompt, count) in enumerate(LOAD):
        wishes = WISHES[i % len(WISHES)]
        scheduler.add(request(str(i), prompt, max_tokens=count, **{"seed": i, **wishes}))
    found: dict[str, tuple[list, list, list]] = {str(i): ([], [], []) for i in range(len(LOAD))}
    for update in drive(scheduler, executor, depth):
        assert update.finish is not FinishReason.ERROR, update.error
        for into, new in zip(found[update.id], (update.tokens, update.logprobs, update.prompt_logprobs), strict=True):
            into.extend(new)
    return found


@STRICTLY
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("name", ["llama-bf16", "gemma-f32", *ON_INT8_KV[1:]])
def test_wishes_are_met_as_on_the_cpu(name: str, pool: str, depth: int, device: Any) -> None:
    """Draws, penalties, masks, logprobs of outputs and prompts: bit for bit."""
    want = said(*engine(name, budget=512, blocks=200), 1)
    assert said(*device_engine(name, device(), budget=19, blocks=POOLS[pool]), depth) == want


@STRICTLY
def test_wishes_are_met_in_captured_steps(depth: int, device: Any) -> None:
    want = said(*engine("llama-f32", budget=512, blocks=200), 1)
    got = said(*device_engine("llama-f32", card := device(), (6,), budget=512, blocks=15, backend=PADDED), depth)
    assert card.replays > 10
    for id, (tokens, logprobs, prompt) in want.items():
        assert got[id][0] == tokens
        for ours, theirs in zip(got[id][1] + got[id][2], logprobs + prompt, strict=True):
            assert (ours.token, ours.rank) == (theirs.token, theirs.rank)
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [t for t, _ in ours.top] == [t for t, _ in theirs.top]


class Poisoned:
    """A model whose logits are not numbers after token ``bad``."""

    def __init__(self, name: str, bad: int):
        self.inner, self.bad = model(name), bad
        self.spec, self.dtype, self.logits = self.inner.spec, self.inner.dtype, self.inner.logits
        self.kernels = self.inner.kernels

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.where((ids == self.bad).unsqueeze(1), torch.nan, self.inner.embed(ids))

    def forward(self, *args: Any) -> Any:
        return self.inner.forward(*args)


@WAYS
def test_a_failed_row_ends_its_request_only(depth: int, device: Any) -> None:
    """The second token of request 0 is poison: it gets that one, and no other request notices."""
    texts = {i: naive("llama-f32", *LOAD[i]) for i in range(4)}
    bad = next(t for t in range(VOCAB) if all(t not in (*LOAD[i][0], *texts[i]) for i in range(1, 4)))
    scheduler, executor = device_engine(
        "llama-f32", device(), budget=512, blocks=200, decoder=Poisoned("llama-f32", bad)
    )
    for i in range(4):
        prompt, count = LOAD[i]
        bias = {"logit_bias": {bad: 100.0}} if i == 0 else {}
        scheduler.add(request(str(i), prompt, max_tokens=count, **bias))
    updates = drive(scheduler, executor, depth)
    ends: dict[str, Update] = {update.id: update for update in updates if update.finish is not None}
    assert ends["0"].finish is FinishReason.ERROR
    assert FAILED in (ends["0"].error or "")
    assert [t for u in updates if u.id == "0" for t in u.tokens] == [bad]
    for i in range(1, 4):
        assert tuple(t for u in updates if u.id == str(i) for t in u.tokens) == texts[i]
    scheduler.check_integrity()


class Broken:
    """A rule that some requests trip over: in telling whether it applies, or in applying it."""

    order, reads_tokens = 99, False

    def __init__(self, where: str):
        self.where = where

    def wants(self, params: SamplingParams) -> bool:
        return params.seed == 13

    def applies(self, row: Row, position: int) -> bool:
        if self.where == "applies":
            raise ValueError("no grammar")
        return True

    def apply(self, scores: torch.Tensor, row: Row, position: int) -> None:
        scores[:] = torch.nan
        raise KeyError("no state")


@WAYS
@pytest.mark.parametrize("where", ["applies", "apply"])
def test_a_rule_that_fails_ends_its_request_only(
    where: str, depth: int, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 6, on a device and on the host."""
    every = (*ordered_rules(), Broken(where))
    monkeypatch.setattr("tuili.runtime.rules.ordered_rules", lambda: every)
    ways = device_engine("llama-f32", device(), budget=64, blocks=200), engine("llama-f32", budget=64, blocks=200)
    for scheduler, executor in ways:
        for i in range(4):
            prompt, count = LOAD[i]
            scheduler.add(request(str(i), prompt, max_tokens=count, seed=13 if i == 2 else i))
        updates = drive(scheduler, executor, depth)
        ends = {update.id: update for update in updates if update.finish is not None}
        assert ends["2"].finish is FinishReason.ERROR
        assert "in a rule for its logits" in (ends["2"].error or "")
        assert not any(update.tokens for update in updates if update.id == "2")
        for i in (0, 1, 3):
            assert tuple(t for u in updates if u.id == str(i) for t in u.tokens) == naive("llama-f32", *LOAD[i])
        scheduler.check_integrity()


@DEVICES
def test_drafts_are_refused_until_they_can_be_verified(device: Any) -> None:
    """Not answered with one token, which would be another text."""
    executor = device_engine("llama-f32", device(), budget=64, blocks=50)[1]
    chunk = Chunk("a", 0, 3, (1, 2, 3), 1, True, (0,), SamplingParams(temperature=0.0), 2)
    assert isinstance(executor.execute(StepPlan(0, (chunk,))).exception(), NotImplementedError)


@DEVICES
def test_an_error_on_the_device_reaches_the_future_and_ends_the_engine(device: Any) -> None:
    scheduler, executor = device_engine("llama-f32", device(), budget=64, blocks=50)
    run = Engine(scheduler, executor, WallClock(), depth=2)
    run.add(request("a", LOAD[0][0], max_tokens=9))
    run.step()

    def broken(*_: Any) -> None:
        raise RuntimeError("an illegal address")

    executor.runner.kv.move = broken  # type: ignore[method-assign]
    with pytest.raises(EngineDead, match="an illegal address"):
        drain(run)
    run.close()


def drain(run: Engine) -> None:
    while run.has_work:
        run.step()


def test_ids_that_were_never_sampled_are_not_made_up() -> None:
    """Law 4: neither where no step sampled for the request, nor where two ids are missing."""
    executor = device_engine("llama-f32", Lagging(), budget=64, blocks=50)[1]
    params = SamplingParams(temperature=0.0)

    def chunk(start: int, tokens: tuple[int, ...], count: int, sample: bool) -> Chunk:
        return Chunk("a", start, count, tokens, 0, sample, (0,) if start == 0 else (), params, 3)

    assert executor.execute(StepPlan(0, (chunk(0, (1, 2), 2, False),))).exception() is None
    lost = executor.execute(StepPlan(1, (chunk(2, (), 1, True),))).exception()
    assert "lacks 1 token ids" in str(lost)
    assert executor.execute(StepPlan(2, (chunk(0, (1, 2), 2, True),))).exception() is None
    lost = executor.execute(StepPlan(3, (chunk(2, (), 2, True),))).exception()
    assert "lacks 2 token ids" in str(lost)


@DEVICES
def test_moved_blocks_are_read(device: Any) -> None:
    """A prompt's blocks, moved elsewhere by a plan without chunks and then by one with, give the same next token."""
    tokens = tuple(range(2 * BLOCK))
    executor = device_engine("llama-f32", device(), budget=64, blocks=50)[1]
    params = SamplingParams(temperature=0.0)

    def step(number: int, id: str, start: int, blocks: tuple[int, ...], moves: tuple[BlockMove, ...] = ()) -> StepPlan:
        own = tokens[start:]
        return StepPlan(
            number, (Chunk(id, start, len(own), own, 0, True, blocks, params, 16, tokens[:start]),), (), moves
        )

    first = executor.execute(step(0, "a", 0, (3, 4)))
    executor.execute(StepPlan(1, (), ("a",), (BlockMove(3, 7),)))
    second = executor.execute(step(2, "b", BLOCK, (9, 8), (BlockMove(7, 9),)))
    assert second.result().tokens["b"] == first.result().tokens["a"]


class Uncapturable(AtOnce):
    def capture(self, function: Callable[[], object]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")


def test_what_can_not_be_captured_runs_eagerly_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    executor = greedy("llama-f32", Uncapturable(), (4,), 2, 512, 200, PADDED)
    assert executor.runner.captured is not None
    assert not executor.runner.captured.shapes
    assert "at 4 rows: operation not permitted" in caplog.text


def test_references_are_not_captured() -> None:
    executor = greedy("llama-f32", card := AtOnce(), (4,), 2, 512, 200)
    assert executor.runner.captured is not None
    assert "read lengths back" in executor.runner.captured.why
    assert card.captures == 0


def test_captures_are_told_and_their_memory_is_measured() -> None:
    class Shrinking(AtOnce):
        def memory(self) -> tuple[int, int]:
            return self.total - 1000 * self.captures, self.total

    told: list[tuple[str, int, int]] = []
    sizes = {"num_blocks": 20, "block_size": BLOCK, "max_model_len": 64, "max_num_seqs": 4}
    decoder = model("llama-f32", PADDED)
    executor = LocalExecutor(
        decoder, Shrinking(), **sizes, capture_sizes=[1, 4], progress=lambda *parts: told.append(parts)
    )
    assert executor.runner.captured is not None
    assert executor.runner.captured.nbytes == 2000
    assert [done for _, done, _ in told] == [0, 1, 2]


def test_host_work_grows_with_the_batch_only() -> None:
    """Law 13: the parcel of a decode step is as large at any length, and holds a new block once in ``BLOCK`` steps."""
    parcels: list[int] = []

    class Counting(AtOnce):
        def host(self, shape: Any, dtype: torch.dtype) -> torch.Tensor:
            parcels.append(int(shape[0]))
            return super().host(shape, dtype)

    def decode(context: int) -> Counter[int]:
        scheduler, executor = device_engine("llama-f32", Counting(), budget=512, blocks=200, rows=3)
        for i in range(3):
            scheduler.add(request(str(i), tuple((j + i) % VOCAB for j in range(context)), max_tokens=BLOCK + 1))
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.update(plan, executor.execute(plan).result())
        parcels.clear()
        drive(scheduler, executor)
        return Counter(parcels)

    assert decode(2 * BLOCK) == decode(16 * BLOCK)


@DEVICES
def test_parcels_and_results_keep_every_bit(device: Any) -> None:
    rng = np.random.default_rng(0)
    card = device()
    arrays = [
        rng.integers(0, 9, 5),
        rng.random(3, np.float32),
        np.array([True, False, True]),
        rng.random((2, 4)),
        np.zeros(0, np.int64),
    ]

    def work() -> list[tuple[torch.Tensor, ...]]:
        there = parcel.unpack()
        return fetch(card, [tuple(there[:3]), (), tuple(there[3:])])

    parcel = Parcel(card, arrays)
    kept, first = [array.copy() for array in arrays], card.submit(work)
    for array in arrays:
        array[...] = 0
    Parcel(card, arrays)
    groups = first.wait()
    assert [len(group) for group in groups] == [3, 0, 2]
    for tensor, array in zip([t for group in groups for t in group], kept, strict=True):
        assert tensor.device == CPU
        assert torch.equal(tensor, torch.from_numpy(array))


# The stand-ins are strict ---------------------------------------------------------------------------------------------


def captured(function: Callable[[], object]) -> Callable[[], None]:
    return AtOnce().capture(function)


def test_a_number_that_python_changes_is_noticed() -> None:
    x, factor = torch.ones(3), [2.0]
    replay = captured(lambda: x.mul_(factor[0]))
    replay()
    factor[0] = 3.0
    with pytest.raises(AssertionError, match="a graph would repeat"):
        replay()


def test_a_tensor_that_python_changes_is_noticed() -> None:
    x, other = torch.ones(3), [torch.ones(3)]
    replay = captured(lambda: x.add_(other[0]))
    other.append(other[0])
    other[0] = torch.zeros(3)
    with pytest.raises(AssertionError, match="a graph would repeat"):
        replay()


def test_reading_back_is_noticed() -> None:
    x = torch.ones(3)
    for function in (lambda: x[0].item(), lambda: x.tolist(), lambda: bool(x[0]), x.nonzero, lambda: x[x > 0]):
        with pytest.raises(RuntimeError, match="read back"):
            captured(function)


def test_a_tensor_made_elsewhere_is_noticed() -> None:
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="not on the device"):
        Strict().submit(lambda: x.add_(torch.ones(3))).wait()
