"""Captured decode steps: the bits of an eager run, for every family's blocks; and what can not be captured is not."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from equality import (
    BLOCK,
    LONGEST,
    ON_KERNELS,
    QUANTIZED,
    VOCAB,
    batch_of,
    drive,
    engine,
    load,
    model,
    outputs,
    request,
)

from tuili import ops
from tuili.base.errors import KernelError
from tuili.layers.decoder import Decoder
from tuili.layers.kvspec import kv_specs
from tuili.ops import cpu
from tuili.runtime.attention.paged import PagedAttention
from tuili.runtime.captured import Parts
from tuili.runtime.captured.native import NativeSteps
from tuili.runtime.captured.recording import Guard, Unrecordable, Workspace
from tuili.runtime.host import Host
from tuili.runtime.kvstore import KVStore

pytestmark = pytest.mark.skipif(not cpu.describe().built, reason=f"the C++ kernels: {cpu.describe().why}")
ROWS, BLOCKS = 12, 40
LLAMA = "llama-f32+cpu"
CPU = ops.kernels_of("cpu") if cpu.describe().built else ops.REFERENCE


class Wrapped:
    """A model whose logits pass through ``change(logits, ids)``."""

    def __init__(self, inner: Decoder, change: Any):
        self.inner, self.change = inner, change
        self.forward, self.kernels = inner.forward, inner.kernels

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        self.ids = ids
        return self.inner.embed(ids)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.change(self.inner.logits(hidden), self.ids)


def pool(inner: Decoder, dtype: str | None = None) -> KVStore:
    dtype = dtype or str(inner.dtype).removeprefix("torch.")
    kv = KVStore(kv_specs(inner.spec, dtype), BLOCKS, BLOCK, Host())
    generator = torch.Generator().manual_seed(0)
    for tensor in kv.tensors:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * (40 if dtype == "int8" else 1))
    return kv


def steps(inner: Any, kv: KVStore, longest: int = 1) -> NativeSteps:
    table, last = torch.zeros(ROWS, LONGEST // BLOCK, dtype=torch.long), torch.zeros(ROWS, dtype=torch.long)
    return NativeSteps(Parts(inner, kv, Host(), PagedAttention(inner.kernels), table, last), longest)


Inputs = tuple[list[int], list[int], np.ndarray, list[int]]


def step(rng: np.random.Generator, rows: int, each: int = 1) -> Inputs:
    """Random ids, first positions, block tables and rows of a step in which every request has ``each`` positions;
    requests share no block that they write."""
    table = np.zeros((ROWS, LONGEST // BLOCK), np.int64)
    own = rng.permutation(BLOCKS)
    positions = rng.integers(0, 3 * BLOCK - each, rows).tolist()
    for row in range(ROWS):
        table[row, :3] = own[3 * row : 3 * row + 3]
    return rng.integers(0, VOCAB, rows * each).tolist(), positions, table, rng.permutation(ROWS)[:rows].tolist()


@torch.inference_mode()
def captured(taken: NativeSteps, inputs: Inputs) -> torch.Tensor | None:
    ids, positions, table, rows = inputs
    each = len(ids) // len(rows)
    taken.inputs.blocks[:] = table
    everywhere = [start + i for start in positions for i in range(each)]
    for part, values in ((taken.inputs.ids, ids), (taken.inputs.positions, everywhere), (taken.inputs.rows, rows)):
        part[: len(values)] = values
    logits = taken.logits((len(rows), each))
    return None if logits is None else logits.clone()


@torch.inference_mode()
def eager(inner: Any, kv: KVStore, inputs: Inputs) -> torch.Tensor:
    """The same step as the runner makes it when it is not captured."""
    ids, positions, table, rows = inputs
    batch = batch_of(positions, [len(ids) // len(rows)] * len(rows), table[rows], inner.kernels)
    return inner.logits(inner.forward(inner.embed(torch.tensor(ids)), batch, kv))


@pytest.mark.parametrize("name", [*ON_KERNELS, *QUANTIZED])
@pytest.mark.parametrize("kv", [None, "int8"])
def test_replays_give_the_bits_of_eager_runs(name: str, kv: str | None) -> None:
    inner = model(name)
    taken_kv, eager_kv = pool(inner, kv), pool(inner, kv)
    taken, rng = steps(inner, taken_kv), np.random.default_rng(1)
    for rows in (3, 1, 12, 3, 1, 3, 12, 12, 2, 2, 2):  # recorded, tried on other inputs, trusted; sizes interleaved
        inputs = step(rng, rows)
        have, want = captured(taken, inputs), eager(inner, eager_kv, inputs)
        assert have is not None, taken.why
        assert torch.equal(have, want)
        assert all(map(torch.equal, taken_kv.tensors, eager_kv.tensors))
    assert taken.shapes == [(1, 1), (2, 1), (3, 1), (12, 1)]


def test_several_positions_of_a_request_are_captured_too() -> None:
    """As a step that verifies drafts has them: every request has as many as the others, and all have scores."""
    inner = model("gemma-f32+cpu")
    taken_kv, eager_kv = pool(inner), pool(inner)
    taken, rng = steps(inner, taken_kv, longest=4), np.random.default_rng(8)
    for rows, each in ((3, 4), (2, 1), (3, 4), (3, 4), (5, 3), (5, 3), (2, 1), (5, 3), (3, 4)):
        inputs = step(rng, rows, each)
        have, want = captured(taken, inputs), eager(inner, eager_kv, inputs)
        assert have is not None, taken.why
        assert have.shape == (rows * each, VOCAB)
        assert torch.equal(have, want)
        assert all(map(torch.equal, taken_kv.tensors, eager_kv.tensors))
    assert taken.shapes == [(2, 1), (3, 4), (5, 3)]


def test_a_replay_refuses_blocks_rows_and_ids_that_are_not_there() -> None:
    inner = model(LLAMA)
    taken, rng = steps(inner, pool(inner)), np.random.default_rng(7)
    for _ in range(3):
        captured(taken, step(rng, 2))
    good = step(rng, 2)
    want = captured(taken, good)
    for part, value, named in ((0, VOCAB, "ids"), (1, LONGEST, "positions"), (2, BLOCKS, "slots"), (3, ROWS, "rows")):
        bad = (list(good[0]), list(good[1]), good[2].copy(), list(good[3]))
        if part == 2:
            bad[2][bad[3][0]] = value
        else:
            bad[part][0] = value  # type: ignore[call-overload]
        with pytest.raises(KernelError, match=f"element 0 of {named} is "):
            captured(taken, bad)
    have = captured(taken, good)
    assert have is not None
    assert want is not None
    assert torch.equal(have, want)


def test_models_on_different_kernels_live_side_by_side() -> None:
    """Neither changes the other's bits, nor what it has captured."""
    one, other = model(LLAMA), model("llama-f32")
    inputs = [step(np.random.default_rng(seed), 3) for seed in range(5)]
    alone = [[eager(inner, kv, each) for each in inputs] for inner, kv in ((one, pool(one)), (other, pool(other)))]
    assert not torch.equal(alone[0][0], alone[1][0]), "other kernels, other last bits"
    taken, kv = steps(one, pool(one)), pool(other)
    for each, *want in zip(inputs, *alone, strict=True):
        have = captured(taken, each)
        assert have is not None
        assert torch.equal(eager(other, kv, each), want[1])
        assert torch.equal(have, want[0])
    assert (taken.why, taken.shapes) == ("", [(3, 1)])


def test_threads_and_instruction_sets_may_change_after_the_recording() -> None:
    inner = model("llama-bf16+cpu")
    kv = pool(inner)
    taken, rng = steps(inner, kv), np.random.default_rng(2)
    for _ in range(3):
        captured(taken, step(rng, 5))
    inputs = step(rng, 5)
    try:
        for threads in (3, 2, 1):
            cpu.set_threads(threads)
            have = captured(taken, inputs)
            assert have is not None
            assert torch.equal(have, eager(inner, kv, inputs))
    finally:
        cpu.set_threads(1)


def test_sizes_share_their_memory() -> None:
    inner = model(LLAMA)
    taken, rng = steps(inner, pool(inner)), np.random.default_rng(3)
    captured(taken, step(rng, 12))
    slots = len(taken._workspace._slots)
    for rows in (1, 2, 5, 7, 11):
        captured(taken, step(rng, rows))
    assert len(taken._workspace._slots) == slots < 14


@pytest.mark.parametrize(
    "change",
    [
        lambda x, ids: x * 2,
        lambda x, ids: x.add_(1),
        lambda x, ids: x + torch.zeros(1),
        lambda x, ids: x[ids.argmin() :],
    ],
    ids=["computes", "in place", "makes", "reads"],
)
def test_a_torch_op_among_the_calls_is_not_missed(change: Any, caplog: pytest.LogCaptureFixture) -> None:
    inner = Wrapped(model(LLAMA), change)
    taken, rng = steps(inner, pool(inner.inner)), np.random.default_rng(4)
    with caplog.at_level(logging.WARNING):
        assert captured(taken, step(rng, 2)) is None
    assert "torch computes aten." in taken.why
    assert not taken.shapes
    assert [taken.why in record.getMessage() for record in caplog.records] == [True]


def test_a_value_that_the_recording_froze_is_noticed() -> None:
    """The model looks at its input outside of torch and acts on it: a replay would repeat the first step's decision."""
    inner = Wrapped(model(LLAMA), lambda x, ids: CPU.scale(x, 1.0 + int(ids.numpy()[0])))
    taken, rng = steps(inner, pool(inner.inner)), np.random.default_rng(5)
    assert captured(taken, step(rng, 2)) is not None
    assert captured(taken, step(rng, 2)) is None
    assert "other bits" in taken.why


def test_a_buffer_that_only_the_recording_wrote_is_noticed() -> None:
    kept: dict[str, torch.Tensor] = {}

    def once(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        if "seen" not in kept:
            kept["seen"] = torch.empty(x.shape)
            kept["seen"].numpy()[:] = 1.0
        return CPU.add(x, kept["seen"])

    inner = Wrapped(model(LLAMA), once)
    taken = steps(inner, pool(inner.inner))
    assert captured(taken, step(np.random.default_rng(6), 2)) is None
    assert "other bits" in taken.why


def test_references_are_not_captured() -> None:
    _, executor = engine("llama-f32", budget=64, blocks=100)
    assert executor.runner.captured is None


def test_views_are_allowed_and_memory_comes_back() -> None:
    workspace = Workspace(8)
    with Guard(workspace, 2):
        x = torch.empty(2, 6)
        first, second = x.split((2, 4), -1)
        second.view(2, 2, 2)
        y = torch.empty_like(x)
        assert x.data_ptr() != y.data_ptr()
        at = y.data_ptr()
        del y
        assert torch.empty(2, 6).data_ptr() == at
        with pytest.raises(Unrecordable, match="aten"):
            x.clone()
        with pytest.raises(Unrecordable, match="aten"):
            first.item() if first.numel() == 1 else x[0, 0].item()


@pytest.mark.parametrize("name", ON_KERNELS)
def test_an_engine_that_can_not_capture_says_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it finds out in the midst of a step."""

    def text() -> dict[str, tuple[int, ...]]:
        scheduler, executor = engine(name, budget=64, blocks=100)
        for i, (prompt, count) in enumerate(load(5)):
            scheduler.add(request(str(i), prompt, max_tokens=count))
        said = outputs(drive(scheduler, executor))
        assert executor.runner.captured is not None
        assert bool(executor.runner.captured.shapes) != bool(executor.runner.captured.why)
        return said

    want = text()
    inner = model(name)
    plain = inner.logits
    monkeypatch.setattr(inner, "logits", lambda hidden: plain(hidden) + 0)
    assert text() == want
