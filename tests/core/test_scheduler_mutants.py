"""Laws of the scheduler that held by luck: each of these fails for a change that all other tests survived."""

from __future__ import annotations

import pytest
from sim_loop import SimLoop, request

from tuili.core.plan import Chunk


def admits(chunk: Chunk) -> bool:
    """Whether the request was admitted with this chunk; one that runs never begins at its history's end."""
    return chunk.start == len(chunk.history)


@pytest.mark.parametrize("depth", [1, 2])
def test_blocks_that_were_just_fought_for_are_not_for_newcomers(depth: int) -> None:
    """``c`` outranks ``b``, which yields to ``a``: in the step of the fight nobody takes what ``a`` needs next."""
    loop = SimLoop(blocks=6, policy="priority", seqs=2, depth=depth, reuse=False)
    best, victim = request("a", range(8), 14, priority=0), request("b", range(20, 28), 14, priority=5)
    loop.add(best, victim)
    loop.step()
    newcomer = request("c", range(30, 34), 4, priority=1)
    loop.add(newcomer)
    loop.drain()
    fights = [plan for plan, stats in zip(loop.plans, loop.stats, strict=True) if stats.preempted]
    assert fights, "the pool is too large: nobody yields"
    for plan in fights:
        assert not any(admits(chunk) for chunk in plan.chunks)
    loop.assert_naive(best, victim, newcomer)


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_victim_in_flight_sits_out_until_it_can_yield(policy: str) -> None:
    """At depth 2 its blocks come free only when it is not scheduled again: a better one must not wait for ever."""
    loop = SimLoop(blocks=8, policy=policy, seqs=2, depth=2, reuse=False)
    best, victim = request("a", range(8), 20, priority=0), request("b", range(20, 27), 20, priority=5)
    loop.add(best, victim)
    loop.drain()
    assert victim.preemptions
    last = max(index for index, plan in enumerate(loop.plans) if any(chunk.id == "a" for chunk in plan.chunks))
    for plan in loop.plans[:last]:
        ids = {chunk.id for chunk in plan.chunks}
        assert ids != {"b"}, f"step {plan.step}: the worse one goes on while the better one waits for its blocks"
    loop.assert_naive(best, victim)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("budget", [3, 7, 11])
def test_only_whole_blocks_are_left_behind(depth: int, budget: int) -> None:
    """Whoever is aborted at whatever step, the next request with its text reads no position that nobody computed."""
    for steps in range(1, 14):
        loop = SimLoop(budget=budget, seqs=2, depth=depth)
        first = request("first", range(12), 9)
        loop.add(first)
        for _ in range(steps):
            loop.step()
        written = 0
        for plan in loop.plans:
            for chunk in plan.chunks:
                written = max(written, chunk.start + chunk.count)
        loop.take(loop.scheduler.abort("first"))
        again = request("again", first.tokens if len(first.tokens) > 12 else [*range(12), 40], 5)
        loop.add(again)
        loop.drain()
        admitted = next(chunk for plan in loop.plans for chunk in plan.chunks if chunk.id == "again")
        assert admitted.start <= written // 4 * 4, f"{steps} steps: {admitted.start} reused of {written} written"
        loop.assert_naive(again)


@pytest.mark.parametrize("depth", [1, 2])
def test_prefix_queries_are_counted_once_per_request(depth: int) -> None:
    """Also of those that were preempted and looked up again."""
    loop = SimLoop(blocks=8, seqs=2, depth=depth)
    both = request("a", range(8), 20), request("b", range(20, 28), 20)
    loop.add(*both)
    loop.drain()
    assert sum(one.preemptions for one in both)
    assert loop.scheduler.cache.queries == 16
    assert loop.scheduler.cache.hits == 0
    loop.add(request("c", [*range(8), 9], 2))
    loop.drain()
    assert loop.scheduler.cache.queries == 25


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("budget", [5, 64])
@pytest.mark.parametrize("reuse", [True, False])
def test_what_is_computed_again_is_no_decoding(depth: int, budget: int, reuse: bool) -> None:
    """A chunk decodes when it holds neither a token of the prompt nor a position that was computed before."""
    loop = SimLoop(blocks=8, budget=budget, seqs=2, depth=depth, reuse=reuse)
    both = request("a", range(4), 24), request("b", range(20, 25), 24)
    loop.add(*both)
    loop.drain()
    assert sum(one.preemptions for one in both)
    known, again = {"a": 4, "b": 5}, 0
    for plan, stats in zip(loop.plans, loop.stats, strict=True):
        decoding = 0
        for chunk in plan.chunks:
            decoding += chunk.count if chunk.start >= known[chunk.id] else 0
            again += chunk.start >= chunk.prompt_len and chunk.start < known[chunk.id]
            known[chunk.id] = max(known[chunk.id], chunk.start + chunk.count)
        assert stats.num_decode_tokens == decoding, f"step {plan.step}"
        assert stats.num_prefill_tokens == stats.num_tokens - decoding
    assert again or budget == 64, "nothing was computed again behind a prompt"
