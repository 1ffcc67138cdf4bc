"""Which KV blocks belong to whom: paged blocks, reference counts, and reuse of full blocks by their content.

The manager knows block numbers and token ids, never tensors. A block is in exactly one of three states: in use (one or
more tables hold it), free with a content hash (can be reused until it is evicted), free without one.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

DIGEST_BYTES = 16


def root_digest(salt: str) -> bytes:
    """The parent of every first block; ``salt`` holds whatever else changes KV: adapter, image, tenant (law 10)."""
    return blake2b(salt.encode(), digest_size=DIGEST_BYTES).digest()


def block_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """128-bit content hash of a full block, chained to everything before it."""
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=DIGEST_BYTES).digest()


@dataclass(slots=True, eq=False)
class BlockTable:
    """One request's place in the cache.

    ``digests`` is the chain of its full blocks of known ids; it outlives preemption, so each block is hashed once.
    ``blocks[:offered]`` were offered for reuse, ``blocks[:verified]`` also came back from the executor without a
    failure (or belong to another writer).
    """

    root: bytes
    digests: list[bytes] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    offered: int = 0
    verified: int = 0
    epoch: int = 0


class KVCacheManager:
    """A pool of ``num_blocks`` blocks of ``block_size`` positions.

    ``reuse`` turns the prefix cache on. Free blocks wait in LRU order: those without content first, then the least
    recently used; of one sequence the tail is evicted before the head, so what stays cached is always a usable prefix.
    """

    def __init__(self, num_blocks: int, block_size: int, reuse: bool):
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks and block_size must be at least 1, got {num_blocks} and {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.reuse = reuse
        self.queries = 0  # prompt tokens looked up
        self.hits = 0  # prompt tokens found
        self.allocated = 0  # blocks handed out, reused ones not counted
        self.evicted = 0  # blocks that lost their content to an allocation
        self._refs = [0] * num_blocks
        self._digest: list[bytes | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._tables: set[BlockTable] = set()
        self._epoch = 0

    @property
    def num_tables(self) -> int:
        """Tables that hold blocks."""
        return len(self._tables)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks whose content can be found by hash, in use or free."""
        return len(self._by_digest)

    @property
    def usage(self) -> float:
        return self.num_used / self.num_blocks

    def blocks_for(self, positions: int) -> int:
        return -(-positions // self.block_size)

    def open(self, tokens: Sequence[int], salt: str = "", digests: Sequence[bytes] = ()) -> BlockTable:
        """An empty table for these ids, hashed; ``digests`` of its first blocks may be known."""
        table = BlockTable(root_digest(salt), list(digests))
        if self.reuse:
            self._digest_full(table, tokens)
        return table

    def lookup(self, table: BlockTable, tokens: Sequence[int]) -> list[int]:
        """Blocks whose content is a prefix of ``tokens``, in order; at least one token is left to compute (law 1)."""
        if not self.reuse:
            return []
        self._digest_full(table, tokens)
        found: list[int] = []
        for digest in table.digests[: (len(tokens) - 1) // self.block_size]:
            block = self._by_digest.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def admit(self, table: BlockTable, found: list[int], positions: int) -> bool:
        """Give ``table`` blocks for ``positions``: ``found`` by ``lookup``, then new ones. False, and nothing changes,
        when there are too few free blocks now."""
        assert not table.blocks, "admitted twice"
        fresh = self.blocks_for(positions) - len(found)
        if fresh + sum(not self._refs[block] for block in found) > len(self._free):
            return False
        for block in found:
            self._hold(block)
        table.blocks = found + self._allocate(fresh)
        table.offered = table.verified = len(found)
        table.epoch = self._epoch
        self._tables.add(table)
        return True

    def count_query(self, tokens: int, hits: int) -> None:
        """Record one look-up in the counters, in tokens."""
        self.queries += tokens
        self.hits += hits

    def grow(self, table: BlockTable, positions: int) -> tuple[int, ...] | None:
        """New blocks so that ``table`` holds ``positions``; None and no change when there are too few free ones."""
        missing = self.blocks_for(positions) - len(table.blocks)
        if missing <= 0:
            return ()
        if missing > len(self._free):
            return None
        new = self._allocate(missing)
        table.blocks.extend(new)
        return tuple(new)

    def offer(self, table: BlockTable, tokens: Sequence[int], positions: int) -> None:
        """Make full blocks among the first ``positions`` findable; their ids are in ``tokens`` and their KV is written,
        or will be by a plan that goes out before anybody can read it. Costs what filled since the last call.

        Of two blocks with one content the first stays the one that is found.
        """
        full = positions // self.block_size
        if full <= table.offered or not self.reuse or table.epoch != self._epoch:
            return
        self._digest_full(table, tokens)
        for index in range(table.offered, full):
            digest, block = table.digests[index], table.blocks[index]
            if digest not in self._by_digest:
                self._by_digest[digest] = block
                self._digest[block] = digest
            table.offered = index + 1

    def verify(self, table: BlockTable, positions: int) -> None:
        """The executor computed the first ``positions`` without a failure."""
        if table.verified < table.offered:
            table.verified = max(table.verified, min(table.offered, positions // self.block_size))

    def unverified(self, table: BlockTable) -> list[int]:
        """Blocks that ``table`` offered and whose content no result has confirmed yet."""
        return table.blocks[table.verified : table.offered]

    def forget(self, blocks: Iterable[int]) -> None:
        """These blocks can no longer be found by content; whoever holds them keeps them."""
        for block in blocks:
            digest = self._digest[block]
            if digest is not None:
                del self._by_digest[digest]
                self._digest[block] = None

    def release(self, table: BlockTable) -> None:
        """Give all blocks back; full ones stay findable until they are evicted. The chain of hashes is kept."""
        for block in reversed(table.blocks):
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free[block] = None
                if self._digest[block] is None:
                    self._free.move_to_end(block, last=False)
        table.blocks = []
        table.offered = table.verified = 0
        self._tables.discard(table)

    def reset(self) -> None:
        """Forget all content (new weights). Sequences that run now offer nothing any more: their KV mixes both."""
        self.forget(list(self._by_digest.values()))
        self._epoch += 1

    def check_integrity(self) -> None:
        """Raises RuntimeError for a leaked block, a wrong reference count, or a hash that points elsewhere. O(pool)."""
        refs = [0] * self.num_blocks
        for table in self._tables:
            if len(set(table.blocks)) != len(table.blocks):
                raise RuntimeError(f"a table holds a block twice: {table.blocks}")
            for block in table.blocks:
                refs[block] += 1
        for block, (want, have) in enumerate(zip(refs, self._refs, strict=True)):
            if want != have:
                raise RuntimeError(f"block {block} is held by {want} tables but counts {have}")
            if (want == 0) != (block in self._free):
                raise RuntimeError(
                    f"block {block} held by {want} tables is {'' if block in self._free else 'not '}free"
                )
        found = {block: digest for digest, block in self._by_digest.items()}
        known = {block: digest for block, digest in enumerate(self._digest) if digest is not None}
        if len(found) != len(self._by_digest) or found != known:
            raise RuntimeError("the hash table and the blocks' own hashes disagree")

    def _digest_full(self, table: BlockTable, tokens: Sequence[int]) -> None:
        """Continue the chain over the blocks that ``tokens`` filled since the last call."""
        size, chain = self.block_size, table.digests
        while (len(chain) + 1) * size <= len(tokens):
            parent = chain[-1] if chain else table.root
            chain.append(block_digest(parent, tokens[len(chain) * size : (len(chain) + 1) * size]))

    def _hold(self, block: int) -> None:
        if self._refs[block] == 0:
            del self._free[block]
        self._refs[block] += 1

    def _allocate(self, count: int) -> list[int]:
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._refs[block] = 1
            if self._digest[block] is not None:
                self.evicted += 1
                self.forget((block,))
        self.allocated += count
        return blocks
