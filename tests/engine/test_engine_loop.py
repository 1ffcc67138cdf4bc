"""The loop: depth does not change what comes out, records are complete, and death is told to everyone."""

from __future__ import annotations

import pytest
from engine_parts import engine

from tuili.base.errors import ConfigError, EngineDead, RequestError
from tuili.core.params import SamplingParams
from tuili.core.request import FinishReason, Request
from tuili.executors.simulated import history_token


def request(id: str, length: int = 5, max_tokens: int = 8, **params) -> Request:
    return Request(id, length, list(range(1, length + 1)), SamplingParams(max_tokens=max_tokens, **params))


def drain(run, limit: int = 10_000) -> dict[str, list]:
    seen: dict[str, list] = {}
    for _ in range(limit):
        if not run.has_work:
            return seen
        for update in run.step():
            seen.setdefault(update.id, []).append(update)
    raise AssertionError("does not drain")


def naive(prompt: list[int], count: int, vocab: int = 400) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(history_token(tokens, vocab))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_output_equals_a_naive_loop_at_every_depth(depth):
    run = engine(depth=depth, seqs=3, budget=8, blocks=24, verify=True)
    for i in range(9):
        run.add(request(f"r{i}", length=3 + i, max_tokens=1 + 2 * i))
    seen = drain(run)
    for i in range(9):
        tokens = [t for update in seen[f"r{i}"] for t in update.tokens]
        assert tokens == naive(list(range(1, 4 + i)), 1 + 2 * i)
        assert [u.finish for u in seen[f"r{i}"]][-1] is FinishReason.LENGTH
        assert sum(u.finish is not None for u in seen[f"r{i}"]) == 1
    run.scheduler.check_integrity()
    assert run.step() == []


def test_depth_keeps_that_many_plans_in_flight():
    order = []
    run = engine(depth=2, before=lambda plan: order.append(plan.step))
    run.add(request("a"))
    run.step()
    assert order == [0, 1]
    with pytest.raises(ConfigError):
        engine(depth=0)


def test_records_add_up():
    run = engine(budget=16, seqs=4)
    records = []
    run.listeners.append(lambda plan, result, stats: records.append(stats))
    run.listeners.append(lambda plan, result, stats: 1 / 0)  # a broken metric ends nobody's request
    for i in range(6):
        run.add(request(f"r{i}", length=10, max_tokens=4))
    drain(run)
    assert [r.step for r in records] == list(range(run.steps))
    assert sum(r.num_decode_tokens for r in records) == 6 * 3
    assert sum(r.num_prefill_tokens for r in records) >= 10
    assert all(r.num_prefill_tokens + r.num_decode_tokens == r.num_tokens <= 16 for r in records)
    assert all(r.device_seconds == 0.01 * 1 and r.num_requests <= 4 for r in records)
    assert records[0].num_waiting >= 2
    snapshot = run.snapshot()
    assert (snapshot.num_running, snapshot.num_waiting, snapshot.kv_blocks_used) == (0, 0, 0)
    assert snapshot.steps == run.steps
    assert snapshot.prefix_hits > 0


@pytest.mark.parametrize("depth", [1, 2])
def test_updates_say_when_a_request_came_and_how_often_it_gave_way(depth):
    """Of this request, as of this update: a client in another process knows nothing else."""
    run = engine(depth=depth, seqs=8, budget=16, blocks=20, verify=True)
    came = {}
    for i in range(8):
        run.clock.advance(1.0)
        came[f"r{i}"] = run.clock.now()
        run.add(request(f"r{i}", length=6, max_tokens=30))
    seen = drain(run)
    for id, updates in seen.items():
        assert {update.timing.queued for update in updates} == {came[id]}
        counts = [update.preemptions for update in updates]
        assert counts == sorted(counts)
        times = updates[-1].timing
        assert times.queued <= times.scheduled <= times.first_token <= times.last_token
    assert sum(updates[-1].preemptions for updates in seen.values()) == run.snapshot().preemptions > 0


def test_abort_frees_at_once():
    run = engine()
    run.add(request("a", max_tokens=100))
    run.add(request("b", max_tokens=100))
    run.step()
    assert run.abort("a").finish is FinishReason.ABORT
    assert run.abort("a") is None
    assert run.abort("never was") is None
    assert {u.id for u in run.step()} == {"b"}
    run.abort("b")
    assert not run.has_work
    assert run.snapshot().kv_blocks_used == 0


def test_a_failed_request_ends_alone():
    run = engine(fails=lambda plan, chunk: "no luck" if chunk.id == "bad" and plan.step == 2 else None)
    run.add(request("bad"))
    run.add(request("good"))
    seen = drain(run)
    assert (seen["bad"][-1].finish, seen["bad"][-1].error) == (FinishReason.ERROR, "no luck")
    assert seen["good"][-1].finish is FinishReason.LENGTH


def test_a_refused_request_changes_nothing():
    run = engine()
    with pytest.raises(RequestError):
        run.add(request("long", length=300))
    assert not run.has_work


@pytest.mark.parametrize("where", ["executor", "scheduler"])
def test_death(where, monkeypatch):
    def die(*_):
        raise OSError("the device fell off the bus")

    run = engine()
    run.add(request("a"))
    run.step()
    monkeypatch.setattr(*((run.executor, "before") if where == "executor" else (run.scheduler, "update")), die)
    with pytest.raises(EngineDead, match="the device fell off the bus") as raised:
        run.step()
    assert isinstance(raised.value.__cause__, OSError)
    for action in (run.step, lambda: run.add(request("b"))):
        with pytest.raises(EngineDead):
            action()
    assert not run.has_work
    assert run.abort("a") is None
    run.close()
    assert run.executor.closed


def test_a_stall_is_death_and_no_endless_loop(monkeypatch):
    run = engine()
    run.add(request("a"))
    monkeypatch.setattr(run.scheduler, "schedule", lambda: None)
    with pytest.raises(EngineDead, match="no plan"):
        run.step()
