"""Law 5 in tokens: every way of scheduling gives what a naive loop gives; laws 1, 2, 3, 7, 8 hold on the way."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_loop import VOCAB, SimLoop, naive, request

from tuili.core.policies import policies
from tuili.executors.simulated import history_token


def workload(seed: int, count: int = 7) -> list:
    """Prompts that share prefixes, some of whole blocks, with stops of every kind."""
    rng = random.Random(seed)
    shared = [rng.randrange(VOCAB) for _ in range(24)]
    out = []
    for index in range(count):
        tokens = shared[: rng.choice((0, 4, 8, 15, 16, 24))] + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 14))]
        most = rng.randint(1, 12)
        out.append(
            request(
                f"r{index}",
                tokens,
                most,
                priority=rng.randint(0, 2),
                min_tokens=rng.randint(0, most),
                eos_token_ids=(1, 2, 3),
                stop_token_ids=(4, 5, 6),
                ignore_eos=rng.random() < 0.3,
            )
        )
    return out


@pytest.mark.parametrize("policy", policies.names())
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_combination_equals_the_naive_loop(policy: str, depth: int) -> None:
    preempted = reused = 0
    grid = itertools.product((4, 7, 64), (13, 20, 64), (True, False), (True, False), (1, 4), range(3))
    for budget, blocks, reuse, chunked, seqs, seed in grid:
        loop = SimLoop(
            blocks=blocks, policy=policy, budget=budget, seqs=seqs, reuse=reuse, chunked=chunked, depth=depth
        )
        requests = workload(seed)
        loop.add(*requests)
        loop.drain()
        loop.assert_naive(*requests)
        preempted += loop.scheduler.preempted
        reused += loop.scheduler.cache.hits
        if chunked:
            assert max(plan.num_tokens for plan in loop.plans) <= budget
    assert preempted > 5, "the tiny pools should preempt"
    assert reused > 100, "the shared prefixes should be reused"


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_arrivals_aborts_failures_and_drafts(data: st.DataObject) -> None:
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    depth = data.draw(st.integers(1, 3))
    failures = {f"r{rng.randrange(20)}": rng.randrange(3) for _ in range(data.draw(st.integers(0, 3)))}

    def fails(plan, chunk):
        if chunk.id in failures:
            failures[chunk.id] -= 1
            return "scripted" if failures[chunk.id] < 0 else None
        return None

    def drafts(id: str, history: list[int]) -> list[int]:
        guess = list(history)
        for _ in range(3):
            guess.append(history_token(guess, VOCAB) if rng.random() < 0.7 else rng.randrange(VOCAB))
        return guess[len(history) :]

    loop = SimLoop(
        blocks=data.draw(st.integers(13, 40)),
        policy=data.draw(st.sampled_from(policies.names())),
        budget=data.draw(st.integers(5, 40)),
        seqs=data.draw(st.integers(1, 5)),
        reuse=data.draw(st.booleans()),
        chunked=data.draw(st.booleans()),
        depth=depth,
        fails=fails,
        drafts=drafts if data.draw(st.booleans()) else None,
    )
    todo = workload(rng.randrange(10**6), 20)
    aborted = set()
    requests = list(todo)
    while todo or loop.scheduler.has_work:
        if todo and rng.random() < 0.5:
            loop.add(todo.pop(0))
        if rng.random() < 0.1:
            id = f"r{rng.randrange(20)}"
            known = id in loop.scheduler.requests
            update = loop.scheduler.abort(id)
            assert (update is not None) == known
            loop.take(update)
            aborted |= {id} if known else set()
        if loop.scheduler.has_work:
            loop.step()
    loop.drain()
    for one in requests:
        last, (tokens, _, _) = loop.last(one.id), naive(one)
        if one.id in aborted:
            assert last.finish == "abort"
        elif last.finish == "error":
            assert one.id in failures
            assert last.error == "scripted"
        else:
            loop.assert_naive(one)
        assert loop.output(one.id) == tokens[: len(loop.output(one.id))]


@pytest.mark.parametrize("depth", [1, 2])
def test_preemption_is_forced_and_changes_nothing(depth: int) -> None:
    requests = [request(f"r{i}", range(i, i + 8), 24) for i in range(4)]
    loop = SimLoop(blocks=10, depth=depth)  # each needs 8 blocks at its end
    loop.add(*requests)
    loop.drain()
    loop.assert_naive(*requests)
    assert loop.scheduler.preempted >= 2
    assert sum(loop.last(r.id).preemptions for r in requests) == loop.scheduler.preempted
    assert sum(s.preempted for s in loop.stats) == loop.scheduler.preempted
    assert loop.finished[0] == "r0", "the first come never yields to a later one"
    assert loop.last("r0").preemptions == 0
    for plan, stats in zip(loop.plans, loop.stats, strict=True):
        assert not (stats.preempted and any(chunk.admitted for chunk in plan.chunks)), "no thrashing within a step"


@pytest.mark.parametrize("depth", [1, 2])
def test_reserved_blocks_are_never_fought_for(depth: int) -> None:
    requests = [request(f"r{i}", range(i, i + 8), 24) for i in range(4)]
    loop = SimLoop(blocks=10, depth=depth, reserve=True)  # room for one at a time
    loop.add(*requests)
    loop.drain()
    loop.assert_naive(*requests)
    assert loop.scheduler.preempted == 0
    assert loop.finished == [one.id for one in requests]
    assert all(len(plan.chunks) <= 1 for plan in loop.plans)


def test_a_preempted_request_goes_before_those_that_came_later() -> None:
    loop = SimLoop(blocks=10, seqs=2)
    loop.add(*[request(f"r{i}", range(9 * i, 9 * i + 8), 20) for i in range(4)])
    loop.drain()
    admitted = [chunk.id for plan in loop.plans for chunk in plan.chunks if chunk.admitted]
    assert len(admitted) > 4
    assert admitted == sorted(admitted)


def test_whole_prompt_reuse_leaves_one_token_to_compute() -> None:
    prompt = list(range(16))
    loop = SimLoop()
    loop.add(request("a", prompt, 2))
    loop.drain()
    loop.add(request("b", prompt, 2))
    loop.drain()
    first = next(chunk for plan in loop.plans for chunk in plan.chunks if chunk.id == "b")
    assert (first.start, first.count, first.history) == (12, 4, tuple(prompt[:12]))
    assert loop.last("b").cached == 12
    assert loop.output("a") == loop.output("b")
    loop.add(request("c", [*prompt, 7], 2))
    loop.drain()
    assert loop.last("c").cached == 16


def test_requests_of_one_step_share_their_prefix() -> None:
    prompt = list(range(33))
    loop = SimLoop(budget=64)
    loop.add(*[request(f"s{i}", prompt, 3) for i in range(4)])
    loop.drain()
    loop.assert_naive(*[request(f"s{i}", prompt, 3) for i in range(4)])
    assert loop.plans[0].num_tokens == 33 + 3
    assert loop.scheduler.cache.hits == 3 * 32


def test_salt_keeps_tenants_apart() -> None:
    loop = SimLoop()
    for id, salt in (("a", ""), ("b", "other"), ("c", "other")):
        loop.add(request(id, range(17), 2, salt=salt))
        loop.drain()
    assert [loop.last(id).cached for id in "abc"] == [0, 0, 16]


def test_prompt_logprobs_do_not_read_the_prefix_cache() -> None:
    loop = SimLoop()
    for id, params in (("a", {}), ("b", {"prompt_logprobs": 0})):
        loop.add(request(id, range(17), 2, **params))
        loop.drain()
    assert loop.last("b").cached == 0
    assert (loop.scheduler.cache.queries, loop.scheduler.cache.hits) == (17, 0)


def test_reset_forgets_and_running_requests_offer_nothing_stale() -> None:
    loop = SimLoop()
    loop.add(request("a", range(8), 12))
    for _ in range(6):
        loop.step()
    loop.scheduler.reset_prefix_cache()
    loop.drain()
    assert loop.scheduler.cache.num_cached == 0
    loop.add(request("b", range(9), 2))
    loop.drain()
    assert loop.last("b").cached == 0
    assert loop.scheduler.cache.num_cached == 2
