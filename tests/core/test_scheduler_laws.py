"""One law or rule of the scheduler per test: failures, stops, limits, order, padding, times, host work per step."""

from __future__ import annotations

import random
import sys
from dataclasses import replace

import pytest
from sim_loop import VOCAB, SimLoop, naive, request

from tuili.base.errors import ConfigError, OverloadedError, RequestError
from tuili.core import cache
from tuili.core.plan import TopLogprobs
from tuili.core.request import FinishReason
from tuili.core.waiting import WaitingQueue
from tuili.executors.simulated import LinearCost

# ------------------------------------------------------------------------------------------- law 6: failures stay put


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_failed_request_ends_alone(depth: int, step: int) -> None:
    loop = SimLoop(depth=depth, fails=lambda plan, c: "NaN in logits" if c.id == "b" and plan.step >= step else None)
    requests = [request(id, [i, 2, 3], 8) for i, id in enumerate("abc")]
    loop.add(*requests)
    loop.drain()
    loop.assert_naive(requests[0], requests[2])
    assert (loop.last("b").finish, loop.last("b").error) == (FinishReason.ERROR, "NaN in logits")


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("tokens", [None, [], [1, 2], [-1], ["x"]])
def test_an_unusable_answer_ends_one_request(depth: int, tokens: list | None) -> None:
    def change(plan, result):
        if plan.step != 2:
            return result
        others = {id: new for id, new in result.tokens.items() if id != "b"}
        return replace(result, tokens=others if tokens is None else {**others, "b": tokens})

    loop = SimLoop(depth=depth, change=change)
    requests = [request(id, [i, 2, 3], 8) for i, id in enumerate("abc")]
    loop.add(*requests)
    loop.drain()
    loop.assert_naive(requests[0], requests[2])
    assert loop.last("b").finish == FinishReason.ERROR
    assert "tokens" in loop.last("b").error


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("others", ["ac", ""])
@pytest.mark.parametrize("where", ["schedule", "update"])
def test_a_bug_in_the_books_of_one_request_ends_it_alone(depth: int, others: str, where: str) -> None:
    loop = SimLoop(depth=depth)
    requests = [request(id, [i, 2, 3], 8) for i, id in enumerate(others)]
    loop.add(request("b", [7, 2, 3], 8), *requests)
    loop.step()
    if where == "schedule":
        loop.scheduler.requests["b"].computed = None  # type: ignore[assignment]
    else:  # not a tuple: `in` raises
        object.__setattr__(loop.scheduler.requests["b"].params, "eos_token_ids", 5)
    loop.drain()
    loop.assert_naive(*requests)
    assert loop.last("b").finish == FinishReason.ERROR
    assert "TypeError" in loop.last("b").error


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("part", ["cache.lookup", "cache.admit", "_start", "cache.count_query", "_add_chunk", "_offer"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_fault_while_one_is_admitted_ends_it_alone(
    part: str, after: bool, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the part had done already: nothing of it stays, and those behind it in the queue come in."""
    loop = SimLoop(depth=depth)
    *owner, name = part.split(".")
    holder = getattr(loop.scheduler, owner[0]) if owner else loop.scheduler
    whole, calls = getattr(holder, name), []

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1 and not after:
            raise ZeroDivisionError("bug")
        made = whole(*args, **kwargs)
        if len(calls) == 1:
            raise ZeroDivisionError("bug")
        return made

    monkeypatch.setattr(holder, name, fails)
    requests = [request(id, [i, 2, 3], 8) for i, id in enumerate("abc")]
    loop.add(*requests)
    loop.drain()
    loop.assert_naive(*requests[1:])
    assert loop.last("a").finish == FinishReason.ERROR
    assert "ZeroDivisionError in the scheduler: bug" in loop.last("a").error
    loop.scheduler.check_integrity()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_readers_of_a_failed_writer_start_over(depth: int) -> None:
    """Requests of one step share blocks that one of them is still writing. It fails, and leaves garbage there."""
    prompt = list(range(30))
    loop = SimLoop(depth=depth, budget=64, fails=lambda plan, c: "boom" if c.id == "w" and plan.step == 0 else None)
    readers = [request(f"s{i}", [*prompt, i, 9, 9, 9, 9], 6) for i in range(3)]
    deeper = request("deeper", [*prompt, 0, 9, 9, 9, 9, 5], 6)  # shares with s0 what s0 built on the garbage
    loop.add(request("w", prompt, 6), *readers, deeper)
    loop.drain()
    assert loop.last("w").error == "boom"
    loop.assert_naive(*readers, deeper)
    assert loop.last("s0").preemptions == 1
    after = request("after", [*prompt, 1, 9, 9, 9, 9, 5], 6)
    loop.add(after)
    loop.drain()
    loop.assert_naive(after)
    assert loop.last("after").cached > 28, "what was computed again is reusable"


@pytest.mark.parametrize("depth", [1, 2])
def test_blocks_written_before_the_failure_stay_trusted(depth: int) -> None:
    loop = SimLoop(depth=depth, fails=lambda plan, c: "boom" if c.id == "w" and plan.step == 4 else None)
    reader = request("s", [*range(30), 7], 6)
    loop.add(request("w", range(30), 9))
    for _ in range(depth):
        loop.step()
    loop.add(reader)
    loop.drain()
    loop.assert_naive(reader)
    assert loop.last("w").error == "boom"
    assert (loop.last("s").cached, loop.last("s").preemptions) == (28, 0)


def test_a_writer_aborted_in_flight_and_then_failed_is_not_trusted() -> None:
    loop = SimLoop(depth=2, fails=lambda plan, c: "boom" if c.id == "w" and plan.step == 0 else None)
    prompt, reader = list(range(30)), request("s", [*range(30), 7], 6)
    loop.add(request("w", prompt, 6), reader)
    plan = loop.scheduler.schedule()
    result = loop.executor.execute(plan).result()
    loop.take(loop.scheduler.abort("w"))
    loop.in_flight.append((plan, result))
    loop.drain()
    assert loop.last("w").finish == FinishReason.ABORT
    loop.assert_naive(reader)
    assert loop.last("s").preemptions == 1


# ------------------------------------------------------------------------------------------- laws 3, 7, 8: ends, aborts


def test_blocks_stay_while_a_plan_in_flight_mentions_the_request() -> None:
    loop = SimLoop(depth=2)
    first = naive(request("a", [1, 2, 3], 1))[0][0]
    loop.add(request("a", [1, 2, 3], 9, eos_token_ids=(first,)))
    scheduler = loop.scheduler
    plans = [scheduler.schedule(), scheduler.schedule()]
    assert (plans[1].chunks[0].tokens, plans[1].chunks[0].count) == ((), 1), "the sampled id is not known here yet"
    results = [loop.executor.execute(plan).result() for plan in plans]
    (update,) = scheduler.update(plans[0], results[0])
    assert update.finish == FinishReason.STOP
    assert "a" not in scheduler.requests
    assert scheduler.has_work
    assert scheduler.cache.num_used > 0
    assert scheduler.update(plans[1], results[1]) == []
    assert scheduler.cache.num_used == 0
    assert not scheduler.has_work


@pytest.mark.parametrize("when", ["waiting", "running", "in flight"])
def test_abort_at_any_time(when: str) -> None:
    loop = SimLoop(seqs=1, depth=2 if when == "in flight" else 1)
    requests = [request("a", [1, 2, 3], 9), request("b", [4, 5, 6], 9)]
    loop.add(*requests)
    for _ in range(3):
        loop.step()
    id, other = ("b", requests[0]) if when == "waiting" else ("a", requests[1])
    update = loop.scheduler.abort(id)
    assert update is not None
    assert update.finish == FinishReason.ABORT
    loop.take(update)
    assert loop.scheduler.abort(id) is None
    if when == "running":
        assert loop.scheduler.cache.num_used == 0, "freed within the step"
    loop.drain()
    loop.assert_naive(other)


def test_ten_thousand_waiting_requests_are_aborted_and_served_quickly() -> None:
    loop = SimLoop(seqs=4, verify=False)
    requests = [request(f"r{i}", [i % VOCAB, 1], 1) for i in range(10_000)]
    loop.add(*requests)
    order = list(range(10_000))
    random.Random(0).shuffle(order)
    for i in order[:9_900]:
        loop.take(loop.scheduler.abort(f"r{i}"))
    assert loop.scheduler.num_waiting == 100
    loop.drain()
    served = loop.finished[9_900:]
    assert served == [f"r{i}" for i in sorted(order[9_900:])], "first come, first served"


# ------------------------------------------------------------------------------------------- stops


def at(prompt: list[int], index: int) -> int:
    return naive(request("x", prompt, index + 1))[0][index]


def test_stop_order_and_min_tokens() -> None:
    prompt = [3, 1, 4, 1, 5]
    third = at(prompt, 2)
    assert third not in (at(prompt, 0), at(prompt, 1))
    cases = {
        "eos wins over stop ids": ({"eos_token_ids": (third,), "stop_token_ids": (third,)}, 3, "stop", None),
        "stop id is the reason": ({"stop_token_ids": (third,)}, 3, "stop", third),
        "ignored eos": ({"eos_token_ids": (third,), "ignore_eos": True}, 6, "length", None),
        "ignored eos that is a stop id": (
            {"eos_token_ids": (third,), "ignore_eos": True, "stop_token_ids": (third,)},
            3,
            "stop",
            third,
        ),
        "min_tokens": ({"eos_token_ids": (third,), "min_tokens": 4}, 6, "length", None),
        "min_tokens met exactly": ({"eos_token_ids": (third,), "min_tokens": 3}, 3, "stop", None),
        "stop wins over length": ({"stop_token_ids": (third,), "max_tokens": 3}, 3, "stop", third),
    }
    for name, (params, count, finish, reason) in cases.items():
        loop = SimLoop()
        most = params.pop("max_tokens", 6)
        loop.add(request("a", prompt, most, **params))
        loop.drain()
        last = loop.last("a")
        assert (len(loop.output("a")), last.finish, last.stop_reason) == (count, finish, reason), name


def test_no_max_tokens_runs_to_the_end_of_the_context() -> None:
    loop = SimLoop(max_model_len=40)
    one = request("a", range(10), 1)
    one.params = one.params.with_(max_tokens=None)
    loop.add(one)
    loop.drain()
    assert (len(loop.output("a")), loop.last("a").finish) == (30, FinishReason.LENGTH)


def test_drafts_make_fewer_steps_and_the_same_tokens() -> None:
    def perfect(id: str, history: list[int]) -> list[int]:
        return naive(request(id, history, 3))[0]

    def useless(id: str, history: list[int]) -> list[int]:
        return [VOCAB + 1] * 3

    steps = {}
    for name, drafts in {"none": None, "perfect": perfect, "useless": useless}.items():
        loop = SimLoop(drafts=drafts)
        requests = [request(id, [i, 2, 3], 16) for i, id in enumerate("abc")]
        loop.add(*requests)
        loop.drain()
        loop.assert_naive(*requests)
        assert name == "none" or any(c.num_draft for plan in loop.plans for c in plan.chunks)
        steps[name] = len(loop.plans)
    assert steps == {"none": 16, "perfect": 5, "useless": 16}


def test_prompt_logprobs_are_handed_out_once_also_after_preemption() -> None:
    def change(plan, result):
        entries = {
            c.id: [TopLogprobs(position, -1.0, 1) for position in range(max(1, c.start), min(c.start + c.count, 20))]
            for c in plan.chunks
            if c.params.prompt_logprobs is not None
        }
        return replace(result, prompt_logprobs={id: e for id, e in entries.items() if e})

    loop = SimLoop(blocks=13, budget=8, change=change)
    loop.add(request("a", range(20), 24), request("b", range(20), 24, prompt_logprobs=0))
    loop.drain()
    assert loop.last("b").preemptions >= 1
    assert [e.token for u in loop.updates["b"] for e in u.prompt_logprobs] == list(range(1, 20))


# ------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("tokens", "max_tokens", "named"),
    [([], 4, "prompt"), ([1] * 30, 11, "max_model_len 40"), ([1] * 40, 1, "max_model_len 40"), ([1, -2], 1, "-2")],
)
def test_requests_that_can_never_run_are_refused(tokens: list[int], max_tokens: int, named: str) -> None:
    loop = SimLoop(max_model_len=40)
    with pytest.raises(RequestError, match=named):
        loop.add(request("a", tokens, max_tokens))
    assert not loop.scheduler.has_work
    loop.add(request("b", [1] * 30, 10))
    with pytest.raises(RequestError, match="in use"):
        loop.add(request("b", [1], 1))


def test_requests_larger_than_the_pool_are_refused() -> None:
    loop = SimLoop(blocks=5, block_size=4)
    with pytest.raises(RequestError, match=r"need 6 KV blocks .* 5 \(20 tokens\)"):
        loop.add(request("a", [1] * 10, 11))
    loop.add(request("b", [1] * 10, 10))
    loop.drain()
    loop.assert_naive(request("b", [1] * 10, 10))


def test_of_the_choices_of_one_prompt_only_the_first_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    digest = cache.block_digest
    monkeypatch.setattr(cache, "block_digest", lambda *block: hashed.append(1) or digest(*block))
    loop = SimLoop(blocks=100, block_size=4, max_model_len=100)
    same = [request(f"r{i}", range(40), 5) for i in range(20)]
    other = [request("salted", range(40), 5, salt="x"), request("longer", range(44), 5), request("twin", range(44), 5)]
    loop.add(*same, *other)
    assert len(hashed) == 10 + 10 + 11
    loop.drain()
    loop.assert_naive(*same, *other)


def test_a_full_queue_refuses() -> None:
    loop = SimLoop(max_queued=2, seqs=1)
    loop.add(request("a", [1]), request("b", [1]), request("c", [1]))  # one of them gets the row
    with pytest.raises(OverloadedError, match="0 requests are running and 3 waiting, the most"):
        loop.add(request("d", [1]))
    loop.step()
    with pytest.raises(OverloadedError, match="1 requests are running and 2 waiting, the most"):
        loop.add(request("d", [1]))
    loop.scheduler.abort("a")
    loop.add(request("d", [1]))
    with pytest.raises(ConfigError, match="max_num_seqs 8"):
        SimLoop(budget=7, seqs=8)


def test_without_chunking_a_prompt_is_one_chunk_even_over_the_budget() -> None:
    loop = SimLoop(chunked=False, budget=16, seqs=4, reuse=False)
    requests = [request(f"r{i}", range(i, i + 10 * (i + 1)), 5) for i in range(4)]
    loop.add(*requests)
    loop.drain()
    loop.assert_naive(*requests)
    for one in requests:
        chunks = [c.count for plan in loop.plans for c in plan.chunks if c.id == one.id]
        assert chunks == [one.prompt_len] + [1] * 4


def test_a_long_prompt_never_stops_the_others_from_decoding() -> None:
    """INVENTORY row 58: also when the long prompt ranks first, every running request gets a token in every step."""
    loop = SimLoop(blocks=100, policy="priority", budget=16, max_model_len=200)
    loop.add(*[request(f"low{i}", [i, 1], 30, priority=5) for i in range(4)])
    loop.step()
    loop.add(request("long", [2] * 150, 4, priority=0))
    while "long" not in loop.finished:
        loop.step()
        assert {c.id for c in loop.plans[-1].chunks} >= {f"low{i}" for i in range(4)} - set(loop.finished)
        assert loop.plans[-1].num_tokens <= 16
    assert len(loop.plans) < 1 + 150 // 12 + 1 + 4 + 1


# ------------------------------------------------------------------------------------------- order


def admissions(loop: SimLoop) -> list[str]:
    return list(dict.fromkeys(chunk.id for plan in loop.plans for chunk in plan.chunks if chunk.admitted))


@pytest.mark.parametrize("blocks", [12, 64])
def test_fcfs_admits_in_the_order_of_arrival(blocks: int) -> None:
    rng = random.Random(blocks)
    loop = SimLoop(blocks=blocks, seqs=3)
    todo = [request(f"r{i}", [rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))], 8) for i in range(30)]
    while todo or loop.scheduler.has_work:
        if todo and rng.random() < 0.6:
            loop.add(todo.pop(0))
        loop.step()
    assert admissions(loop) == [f"r{i}" for i in range(30)]


def test_a_higher_class_never_waits_behind_a_lower_one() -> None:
    rng = random.Random(3)
    loop = SimLoop(policy="priority", seqs=2)
    todo = [request(f"r{i}", [i % VOCAB] * rng.randint(1, 20), 6, priority=rng.randint(0, 3)) for i in range(40)]
    classes = {r.id: (r.priority, i) for i, r in enumerate(todo)}
    while todo or loop.scheduler.has_work:
        waiting = {id for id in loop.scheduler.requests if id not in admissions(loop)}
        before = len(loop.plans)
        loop.step()
        if len(loop.plans) > before:
            taken = [chunk.id for chunk in loop.plans[-1].chunks if chunk.id in waiting]
            left = waiting - set(taken)
            assert taken == sorted(taken, key=classes.get)
            assert not taken or not left or max(classes[i] for i in taken) < min(classes[i] for i in left)
        if todo and rng.random() < 0.7:
            loop.add(todo.pop(0))


def flood(aging: float | None) -> float:
    """Seconds that one request of class 2 waits under an endless load of class 0 that fills the only row."""
    loop = SimLoop(policy="priority", policy_options={"aging_seconds": aging}, seqs=1)
    loop.add(request("high0", [1], 5), request("low", [2], 5, priority=2))
    for index in range(1, 200):
        loop.add(request(f"high{index}", [1], 5))
        for _ in range(4):
            loop.step()
        if "low" in loop.finished:
            break
    timing = loop.last("low").timing if loop.updates["low"] else None
    return timing.scheduled - timing.queued if timing else float("inf")


def test_ageing_bounds_starvation() -> None:
    """What can overtake arrives within 2 classes * aging seconds; served at one per 5 s, arriving at one per 4 s."""
    assert flood(None) == float("inf")
    for aging in (5.0, 20.0):
        bound = (2 * aging / 4 + 1) * 5  # everything that may overtake, one after the other, in the single row
        assert 2 * aging <= flood(aging) <= bound + 5
    with pytest.raises(ConfigError, match="aging_seconds"):
        SimLoop(policy="priority", policy_options={"aging_seconds": 0})


def test_the_lowest_class_yields_when_the_pool_is_full() -> None:
    loop = SimLoop(blocks=12, policy="priority")
    loop.add(request("low", range(8), 24, priority=9), request("mid", range(8, 16), 24, priority=5))
    loop.step()
    loop.add(request("high", range(16, 24), 24, priority=1))
    loop.drain()
    assert loop.last("low").preemptions > 0
    assert loop.last("high").preemptions == 0
    assert loop.finished == ["high", "mid", "low"]


def test_the_queue_keeps_rank_order_through_pops_and_discards() -> None:
    class Item:
        def __init__(self, key: int, number: int):
            self.rank = (key, number)

    rng = random.Random(1)
    queue: WaitingQueue[Item] = WaitingQueue()
    model: list[Item] = []
    for number in range(3000):
        roll = rng.random()
        if roll < 0.5 or not model:
            model.append(Item(rng.randrange(5), number))
            queue.push(model[-1])
        elif roll < 0.75:
            queue.discard(model.pop(rng.randrange(len(model))))
        else:
            best = min(model, key=lambda item: item.rank)
            assert queue.peek() is best
            assert queue.pop() is best
            model.remove(best)
            if rng.random() < 0.3:  # a preempted request comes back with the same rank
                model.append(best)
                queue.push(best)
        assert len(queue) == len(model)


# ------------------------------------------------------------------------------------------- static batching


def test_static_batches_wait_for_each_other_and_count_their_padding() -> None:
    loop = SimLoop(policy="static", seqs=2, reuse=False)
    lengths = {"a": (3, 2), "b": (5, 6), "c": (1, 3), "d": (1, 1)}
    loop.add(*[request(id, [i] * prompt, most) for i, (id, (prompt, most)) in enumerate(lengths.items())])
    loop.drain()
    rows = [{c.id for c in plan.chunks} for plan in loop.plans]
    assert rows == [{"a", "b"}, {"a", "b"}] + [{"b"}] * 4 + [{"c", "d"}, {"c"}, {"c"}]
    # prompt padding 5 - 3, then one empty row for each of b's last 4 steps; then none, then d's row twice
    assert [s.padding_tokens for s in loop.stats] == [2, 0, 1, 1, 1, 1, 0, 1, 1]


def test_continuous_batching_beats_static_in_virtual_time() -> None:
    rng = random.Random(5)
    work = [(rng.randint(1, 10), rng.randint(1, 40)) for _ in range(40)]
    seconds = {}
    for policy in ("static", "fcfs"):
        loop = SimLoop(blocks=200, policy=policy, seqs=8, cost=LinearCost(per_step=1.0, per_token=0.01))
        requests = [request(f"r{i}", [i] * prompt, most) for i, (prompt, most) in enumerate(work)]
        loop.add(*requests)
        loop.drain()
        loop.assert_naive(*requests)
        seconds[policy] = loop.clock.now()
        assert (sum(s.padding_tokens for s in loop.stats) > 0) == (policy == "static")
    assert seconds["fcfs"] < 0.8 * seconds["static"]


# ------------------------------------------------------------------------------------------- times and counts


def test_queue_prefill_and_decode_add_up() -> None:
    loop = SimLoop(blocks=14, seqs=3, budget=8, cost=LinearCost(0.25, 0.125, 0.001))
    rng = random.Random(2)
    todo = [request(f"r{i}", [i] * rng.randint(1, 20), rng.randint(1, 20)) for i in range(20)]
    arrived = {}
    while todo or loop.scheduler.has_work:
        if todo:
            arrived[todo[0].id] = loop.clock.now()
            loop.add(todo.pop(0))
        loop.step()
    assert loop.scheduler.preempted > 0
    for id, updates in loop.updates.items():
        t = updates[-1].timing
        assert t.queued == arrived[id] <= t.scheduled < t.first_token <= t.last_token
        queue, prefill, decode = t.scheduled - t.queued, t.first_token - t.scheduled, t.last_token - t.first_token
        assert queue + prefill + decode == pytest.approx(t.last_token - t.queued)
        assert updates[0].timing.last_token == t.first_token
    assert sum(s.num_tokens for s in loop.stats) == sum(s.num_prefill_tokens + s.num_decode_tokens for s in loop.stats)


def test_stats_of_a_step() -> None:
    loop = SimLoop(blocks=20, seqs=2, reuse=False)
    loop.add(*[request(f"r{i}", [1] * 6, 3) for i in range(3)])
    loop.drain()
    first, second = loop.stats[:2]
    assert (first.num_tokens, first.num_prefill_tokens, first.num_decode_tokens) == (12, 12, 0)
    assert (first.num_requests, first.num_waiting, first.kv_blocks_used, first.kv_blocks_total) == (2, 1, 4, 20)
    assert (second.num_tokens, second.num_prefill_tokens, second.num_decode_tokens) == (2, 0, 2)


def test_results_must_come_back_in_order() -> None:
    loop = SimLoop(depth=2)
    loop.add(request("a", [1], 5))
    plans = [loop.scheduler.schedule(), loop.scheduler.schedule()]
    results = [loop.executor.execute(plan).result() for plan in plans]
    with pytest.raises(ValueError, match="oldest in flight is 0"):
        loop.scheduler.update(plans[1], results[1])


# ------------------------------------------------------------------------------------------- law 13: host work


def events_per_decode_step(context: int, rows: int = 4, steps: int = 33, depth: int = 1) -> list[int]:
    """Python and C calls of schedule + update, for ``rows`` requests that have ``context`` tokens."""
    loop = SimLoop(
        blocks=rows * (context // 16 + 8),
        block_size=16,
        max_model_len=context + 200,
        budget=rows * context,
        verify=False,
    )
    for i in range(rows):
        loop.add(request(f"r{i}", [i] * context, 100))
    loop.step()
    counts = []
    for _ in range(steps):
        events = 0

        def count(frame, event, arg):
            nonlocal events
            events += event in ("call", "c_call")

        sys.setprofile(count)
        plan = loop.scheduler.schedule()
        sys.setprofile(None)
        result = loop.executor.execute(plan).result()
        sys.setprofile(count)
        loop.scheduler.update(plan, result)
        sys.setprofile(None)
        counts.append(events)
    return counts


def test_host_work_per_step_does_not_grow_with_context() -> None:
    short = events_per_decode_step(64)
    assert events_per_decode_step(64 * 256) == short
    assert sum(events_per_decode_step(64, rows=16)) < 4.2 * sum(short), "linear in the batch"


def test_a_blocked_head_of_the_queue_costs_nothing_per_step() -> None:
    """A long request that waits for blocks is not hashed or looked up again in every step."""
    loop = SimLoop(blocks=600, block_size=4, max_model_len=2400, budget=2400, verify=False)
    loop.add(request("runs", [1] * 1000, 300))
    loop.step()
    lookups = []
    original = loop.scheduler.cache.lookup
    loop.scheduler.cache.lookup = lambda *args: lookups.append(1) or original(*args)  # type: ignore[method-assign]
    loop.add(request("waits", [2] * 1600, 4))
    for _ in range(200):
        loop.step()
    assert len(lookups) == 1
    loop.drain()
    loop.assert_naive(request("waits", [2] * 1600, 4))
