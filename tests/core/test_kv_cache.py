"""The block pool against oracles: a naive set of books, and the LRU prefix cache of interfaces.md 5.10."""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuili.core.cache import BlockTable, KVCacheManager, block_digest, root_digest

TRACES = Path(__file__).resolve().parents[3] / "shared" / "data" / "traces" / "mooncake"


def lru_hits(rows: list[list[int]], cap: int | None = None, tail_first: bool = False) -> tuple[int, int]:
    """The oracle of interfaces.md 5.10: the head of a row is its oldest block; ``tail_first``: its tail, as ours."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = total = 0
    for ids in rows:
        total += len(ids)
        for found in ids:
            if found not in cache:
                break
            hits += 1
        for id in reversed(ids) if tail_first else ids:
            cache[id] = None
            cache.move_to_end(id)
        while cap is not None and len(cache) > cap:
            cache.popitem(last=False)
    return hits, total


def manager_hits(rows: list[list[int]], blocks: int) -> int:
    """The same requests one after the other through the manager: an id is a block of 2 tokens, then one more token."""
    cache = KVCacheManager(blocks + 1, 2, reuse=True)  # one more block holds that last token
    hits = 0
    for ids in rows:
        tokens = [id for id in ids for _ in range(2)] + [0]
        table = cache.open(tokens)
        found = cache.lookup(table, tokens)
        hits += len(found)
        assert cache.admit(table, found, len(tokens))
        cache.offer(table, tokens, len(tokens))
        cache.release(table)
    cache.check_integrity()
    return hits


def random_rows(rng: random.Random, count: int) -> list[list[int]]:
    """Chained ids, as in the trace format: an id stands for a block after its prefix, so rows are paths of a tree."""
    rows: list[list[int]] = [[]]
    fresh = iter(range(10**9))
    for _ in range(count):
        base = rng.choice(rows)
        rows.append(base[: rng.randint(0, len(base))] + [next(fresh) for _ in range(rng.randint(1, 5))])
        rows[-1] = rows[-1][:20]
    return rows[1:]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(20, 120))
def test_hits_equal_the_lru_oracle(seed: int, cap: int) -> None:
    rows = random_rows(random.Random(seed), 200)
    assert manager_hits(rows, cap) == lru_hits(rows, cap, tail_first=True)[0]
    everything = sum(map(len, rows))
    assert manager_hits(rows, everything) == lru_hits(rows)[0]


@pytest.mark.parametrize(("name", "published"), [("conversation", 105_710), ("synthetic", 77_953)])
def test_hits_on_a_real_trace(name: str, published: int) -> None:
    path = TRACES / f"{name}_trace.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here: the Mooncake traces of the shared folder are needed")
    rows = [json.loads(line)["hash_ids"] for line in path.read_text().splitlines()]
    assert lru_hits(rows)[0] == published, "the table of interfaces.md 5.10"
    assert manager_hits(rows, sum(map(len, rows))) == published
    some = rows[:3000]
    for cap in (1000, 10_000):
        hits = manager_hits(some, cap)
        assert hits == lru_hits(some, cap, tail_first=True)[0]
        assert hits >= lru_hits(some, cap)[0], "evicting tails first should not lose hits on a real trace"


def test_chained_digests_tell_prefix_content_and_salt_apart() -> None:
    root = root_digest("")
    first = block_digest(root, [1, 2])
    digests = {
        first,
        block_digest(root, [2, 1]),
        block_digest(first, [1, 2]),
        block_digest(root_digest("lora-7"), [1, 2]),
        block_digest(root, [1, 2 + 2**8]),
        block_digest(root, [1, 2 + 2**16]),
    }
    assert len(digests) == 6
    assert all(len(digest) == 16 for digest in digests)


def test_the_tail_of_a_sequence_is_evicted_before_its_head() -> None:
    cache = KVCacheManager(5, 2, reuse=True)
    tokens = list(range(9))
    table = admit(cache, tokens)
    cache.offer(table, tokens, 8)
    cache.release(table)
    held = admit(cache, [100])  # the block that was only half full goes first
    assert (cache.num_cached, cache.evicted) == (4, 0)
    more = admit(cache, [101])
    assert (cache.num_cached, cache.evicted) == (3, 1)
    table = cache.open(tokens)
    assert len(cache.lookup(table, tokens)) == 3
    cache.release(held)
    cache.release(more)
    cache.check_integrity()


def admit(cache: KVCacheManager, tokens: list[int]) -> BlockTable:
    table = cache.open(tokens)
    assert cache.admit(table, cache.lookup(table, tokens), len(tokens))
    return table


def test_no_room_changes_nothing() -> None:
    cache = KVCacheManager(4, 2, reuse=True)
    first = admit(cache, [1, 2, 3, 4, 5])
    cache.offer(first, [1, 2, 3, 4, 5], 4)
    table = cache.open([1, 2, 3, 4, 5, 6, 7, 8])
    found = cache.lookup(table, [1, 2, 3, 4, 5, 6, 7, 8])
    assert len(found) == 2
    assert not cache.admit(table, found, 8)
    assert cache.grow(first, 9) is None
    assert cache.num_free == 1
    cache.check_integrity()
    cache.release(first)
    assert cache.admit(table, found, 8)
    assert cache.num_free == 0


def test_ten_thousand_allocations_and_frees() -> None:
    """INVENTORY row 41: at most block_size - 1 positions of a sequence are waste; nothing leaks."""
    rng = random.Random(0)
    cache = KVCacheManager(97, 8, reuse=True)
    live: list[tuple[BlockTable, list[int]]] = []
    events = 0
    while events < 10_000:
        events += 1
        roll = rng.random()
        if roll < 0.35:
            tokens = [7] * rng.choice((0, 8, 16, 24)) + [rng.randrange(3) for _ in range(rng.randint(1, 40))]
            table = cache.open(tokens)
            free = cache.num_free
            found = cache.lookup(table, tokens)
            assert len(found) * 8 < len(tokens)
            if cache.admit(table, found, len(tokens)):
                live.append((table, tokens))
            else:
                assert cache.num_free == free
        elif live and roll < 0.75:
            table, tokens = rng.choice(live)
            new = cache.grow(table, len(tokens) + 1)
            if new is not None:
                cache.offer(table, tokens, len(tokens))
                tokens.append(rng.randrange(3))
        elif live:
            cache.release(live.pop(rng.randrange(len(live)))[0])
        for table, tokens in live[-3:]:
            assert 0 <= len(table.blocks) * 8 - len(tokens) <= 7
        if events % 50 == 0:
            cache.check_integrity()
            books = {block for table, _ in live for block in table.blocks}
            assert cache.num_used == len(books)
            assert cache.usage == len(books) / 97
    assert cache.evicted > 100
    for table, _ in live:
        cache.release(table)
    assert (cache.num_used, cache.num_tables) == (0, 0)
    cache.check_integrity()


@pytest.mark.parametrize("damage", ["leak", "count", "hash", "twice"])
def test_integrity_check_finds_damage(damage: str) -> None:
    cache = KVCacheManager(8, 2, reuse=True)
    table = admit(cache, [1, 2, 3])
    cache.offer(table, [1, 2, 3], 2)
    cache.check_integrity()
    if damage == "leak":
        cache._free.popitem()
    elif damage == "count":
        cache._refs[table.blocks[0]] += 1
    elif damage == "hash":
        cache._by_digest[b"x"] = 5
    else:
        table.blocks.append(table.blocks[0])
    with pytest.raises(RuntimeError):
        cache.check_integrity()
