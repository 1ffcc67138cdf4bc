"""Streams: every accepted request ends in an output or a typed error; leaving a stream frees its blocks."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from contextlib import contextmanager

import pytest
from engine_parts import engine
from test_engine_loop import naive, request

from tuili.base.errors import EngineDead, OverloadedError, RequestError, RequestFailed
from tuili.engine.client import EngineClosed, ThreadClient


@contextmanager
def client_of(run):
    client = ThreadClient(run)
    try:
        yield client
    finally:
        client.close()
        assert run.executor.closed


async def collect(client, *requests) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {r.id: [] for r in requests}
    async for update in client.generate(requests):
        tokens[update.id] += update.tokens
    return tokens


async def idle(client, seconds: float = 5.0) -> None:
    """Until the engine has nothing left, which must be soon."""
    for _ in range(int(seconds * 200)):
        if not client.engine.scheduler.has_work:
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"still busy: {client.engine.snapshot()}")


def test_many_streams_at_once_equal_the_naive_loop():
    async def main(client):
        requests = [request(f"r{i}", length=2 + i % 7, max_tokens=1 + i % 11) for i in range(200)]
        results = await asyncio.gather(*(collect(client, r) for r in requests))
        for r, result in zip(requests, results, strict=True):
            assert result[r.id] == naive(r.tokens[: r.prompt_len], r.params.max_tokens)

    with client_of(engine(blocks=128)) as client:
        asyncio.run(main(client))
        client.engine.scheduler.check_integrity()


def test_a_group_shares_a_stream():
    async def main(client):
        requests = [request(f"g-{i}", max_tokens=3 + i) for i in range(4)]
        tokens = await collect(client, *requests)
        assert {id: len(t) for id, t in tokens.items()} == {f"g-{i}": 3 + i for i in range(4)}

    with client_of(engine()) as client:
        asyncio.run(main(client))


def test_streams_of_several_loops_in_several_threads():
    failures = []

    def work(client, name):
        async def main():
            requests = [request(f"{name}-{i}", length=3, max_tokens=20) for i in range(20)]
            for result in await asyncio.gather(*(collect(client, r) for r in requests)):
                for tokens in result.values():
                    assert tokens == naive([1, 2, 3], 20)

        try:
            asyncio.run(main())
        except BaseException as error:
            failures.append(error)

    with client_of(engine()) as client:
        threads = [threading.Thread(target=work, args=(client, f"t{i}")) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert not failures


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_leaving_a_stream_frees_its_blocks(how):
    async def main(client):
        stay = asyncio.create_task(collect(client, request("stay", max_tokens=150)))
        stream = client.generate([request("a", max_tokens=150), request("b", max_tokens=150)])
        if how == "close":
            await anext(stream)
            stream.close()
            stream.close()
        else:

            async def consume():
                try:
                    async for _ in stream:
                        pass
                finally:
                    stream.close()

            task = asyncio.create_task(consume())
            for _ in range(10):
                await asyncio.sleep(0.002)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        for _ in range(200):
            if set(client.engine.scheduler.requests) == {"stay"}:
                break
            await asyncio.sleep(0.005)
        assert set(client.engine.scheduler.requests) == {"stay"}
        assert len((await stay)["stay"]) == 150
        await idle(client)
        assert client.engine.snapshot().kv_blocks_used == 0

    pause = lambda plan: time.sleep(0.002)  # noqa: E731
    with client_of(engine(before=pause)) as client:
        asyncio.run(main(client))


def test_aborting_one_of_a_group():
    async def main(client):
        stream = client.generate([request("a", max_tokens=150), request("b", max_tokens=5)])
        await anext(stream)
        stream.abort("a")
        assert [u.id for u in [u async for u in stream] if u.finish] == ["b"]
        await idle(client)

    with client_of(engine()) as client:
        asyncio.run(main(client))


def test_refusals_come_before_any_update_and_refuse_the_whole_group():
    async def main(client):
        with pytest.raises(RequestError):
            await anext(client.generate([request("ok"), request("long", length=300)]))
        first = client.generate([request("one", max_tokens=100)])
        await anext(first)
        with pytest.raises(RequestError, match="in use"):
            await anext(client.generate([request("one")]))
        with pytest.raises(OverloadedError) as raised:
            await anext(client.generate([request(f"many{i}", max_tokens=100) for i in range(4)]))
        assert raised.value.retry_after > 0
        first.close()
        await idle(client)

    pause = lambda plan: time.sleep(0.005)  # noqa: E731
    with client_of(engine(seqs=1, max_queued=2, before=pause)) as client:
        asyncio.run(main(client))


def test_what_breaks_one_request_at_the_door_is_its_own(monkeypatch):
    async def main(client):
        with pytest.raises(RequestFailed, match="KeyError"):
            await collect(client, request("bad"))
        await collect(client, request("good"))

    run = engine()
    add = run.scheduler.add
    monkeypatch.setattr(run.scheduler, "add", lambda r: add(r) if r.id != "bad" else {}["x"])
    with client_of(run) as client:
        asyncio.run(main(client))


def test_death_reaches_every_stream():
    def before(plan):
        if plan.step == 5:
            raise OSError("gone")

    async def main(client):
        tasks = [asyncio.create_task(collect(client, request(f"r{i}", max_tokens=50))) for i in range(30)]
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
        assert all(type(r) is EngineDead for r in results), results
        assert len({id(r) for r in results}) == len(results), "each has its own"
        with pytest.raises(EngineDead, match="gone"):
            await collect(client, request("late"))

    with client_of(engine(seqs=4, before=before)) as client:
        asyncio.run(main(client))


def test_closing_ends_streams_with_a_typed_error():
    async def main(client):
        stream = client.generate([request("a", max_tokens=150)])
        await anext(stream)
        await asyncio.to_thread(client.close)
        with pytest.raises(EngineClosed):
            async for _ in stream:
                pass
        with pytest.raises(EngineClosed):
            await asyncio.wait_for(collect(client, request("late")), 5)

    pause = lambda plan: time.sleep(0.002)  # noqa: E731
    with client_of(engine(before=pause)) as client:
        asyncio.run(main(client))


def test_an_idle_engine_sleeps_and_wakes():
    async def main(client):
        for i in range(3):
            await collect(client, request(f"r{i}"))
            await idle(client)
            steps, before = client.engine.steps, time.process_time()
            await asyncio.sleep(0.2)
            assert client.engine.steps == steps
            assert time.process_time() - before < 0.1, "busy waiting"

    with client_of(engine()) as client:
        asyncio.run(main(client))


def test_one_wake_up_per_step_and_loop():
    async def main(client):
        loop = asyncio.get_running_loop()
        calls, real = [], loop.call_soon_threadsafe

        def counted(callback, *args, **more):
            calls.append(callback)
            return real(callback, *args, **more)

        loop.call_soon_threadsafe = counted
        await asyncio.gather(*(collect(client, request(f"r{i}", max_tokens=20)) for i in range(16)))
        assert len(calls) <= client.engine.steps + 1

    with client_of(engine(budget=200)) as client:
        asyncio.run(main(client))


def test_random_leaving_leaks_nothing_and_the_rest_is_right():
    """Law 8 from above: a tiny pool, preemption, and consumers that leave when they like."""
    chance = random.Random(5)

    async def one(client, i, leave_after):
        r = request(f"r{i}", length=2 + i % 9, max_tokens=1 + i * 7 % 40)
        stream, tokens = client.generate([r]), []
        try:
            async for update in stream:
                tokens += update.tokens
                if len(tokens) >= leave_after:
                    return
                if i % 5 == 0:
                    await asyncio.sleep(0.002)  # a slow reader
        finally:
            stream.close()
        assert tokens == naive(r.tokens[: r.prompt_len], r.params.max_tokens)

    async def main(client):
        tasks = [asyncio.create_task(one(client, i, chance.choice((1, 3, 999, 999)))) for i in range(120)]
        await asyncio.sleep(0.02)
        for task in chance.sample(tasks, 20):
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert not [r for r in results if isinstance(r, Exception)]
        await idle(client)
        client.engine.scheduler.check_integrity()
        assert client.engine.snapshot().kv_blocks_used == 0

    with client_of(engine(blocks=26, max_model_len=100, verify=True)) as client:
        asyncio.run(main(client))
        assert client.engine.snapshot().preemptions > 0


def test_what_was_on_its_way_when_its_request_was_aborted_is_not_handed_out():
    async def main(client):
        stream = client.generate([request("a", max_tokens=100), request("b", max_tokens=3)])
        await anext(stream)
        await asyncio.sleep(0.05)  # many updates of "a" wait now
        stream.abort("a")
        assert {u.id async for u in stream} == {"b"}

    with client_of(engine()) as client:
        asyncio.run(main(client))


def test_a_loop_that_went_away_leaves_nothing_behind():
    def forget(client):
        loop = asyncio.new_event_loop()

        async def start():
            await anext(client.generate([request("lost", max_tokens=150)]))

        loop.run_until_complete(start())
        loop.close()

    with client_of(engine(before=lambda plan: time.sleep(0.001))) as client:
        thread = threading.Thread(target=forget, args=(client,))
        thread.start()
        thread.join()
        asyncio.run(idle(client))
        assert client.engine.snapshot().kv_blocks_used == 0


def test_the_books_are_checked_when_nothing_is_asked(monkeypatch):
    """A block that nobody holds and nobody gave back ends the engine, before somebody is given what another writes."""
    monkeypatch.setattr("tuili.engine.client.IDLE", 0.01)

    async def main(client):
        assert await collect(client, request("a", max_tokens=3))
        await asyncio.sleep(0.05)
        assert client.healthy()
        client.engine.scheduler.cache._refs[5] += 1
        assert await collect(client, request("b", max_tokens=3))
        for _ in range(500):
            if not client.healthy():
                break
            await asyncio.sleep(0.01)
        with pytest.raises(EngineDead, match="books disagree"):
            await collect(client, request("c", max_tokens=3))

    with client_of(engine(blocks=128)) as client:
        asyncio.run(main(client))
