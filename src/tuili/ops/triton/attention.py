"""Attention over the paged cache: FlashAttention-2's online softmax (Dao 2023, arXiv:2307.08691), split for decode.

A program takes a tile of rows: some neighbouring queries of one request, times the query heads that share one KV head,
so that K and V are read once for the group. It steps over the keys that any of its rows may see. Where that would leave
multiprocessors idle, the keys are split among several programs, and ``_merge`` adds their results (flash-decoding).

Which request a tile belongs to is found on the device, and nothing about the lengths is read back: the launch depends
on shapes alone, so that it can be captured.

Masked keys change nothing, bit for bit: they add exact zeros, and the running maximum stays. So the bits of a row
depend on the tile's shape and on where the keys are split, never on the other rows. ``triton_invariant`` fixes both:
one tile for prefill and decode, partitions at absolute positions, merged in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from tuili.ops.table import implement
from tuili.ops.triton import tuning
from tuili.ops.triton.about import FAST, INVARIANT, describe, processors
from tuili.ops.triton.cache import block_size, key_place, key_places, value_place, value_places
from tuili.ops.triton.language import LOG2_E, cast, dot, tanh, widen
from tuili.ops.triton.rowwise import dense_last, pad

#: Keys of a partition in the invariant kernel; part of its meaning.
PARTITION = 1024
MAX_SPLITS = 128


@triton.jit
def _step(
    q,
    acc,
    top,
    total,
    n,
    end,
    positions,
    head,
    blocks,
    caches,
    strides,
    scale,
    cap,
    MASKED: tl.constexpr,
    KEYS: tl.constexpr,
    KIND: tl.constexpr,
):
    """Keys ``n .. n + KEYS`` (those below ``end``); ``top`` and ``total`` are of powers of two."""
    WINDOW: tl.constexpr = KIND[0]
    DIM: tl.constexpr = KIND[3]
    PADDED: tl.constexpr = KIND[4]
    SIZE: tl.constexpr = KIND[5]
    at = tl.arange(0, PADDED)
    keys = n + tl.arange(0, KEYS)
    inside = keys < end
    page = tl.load(blocks + keys // SIZE, mask=inside, other=0).to(tl.int64)
    slot = keys % SIZE
    k_places = caches[0] + key_place(page[None, :], slot[None, :], head, at[:, None], strides[0], KIND[6])
    v_places = caches[1] + value_place(page[:, None], slot[:, None], head, at[None, :], strides[1], KIND[7])
    if MASKED or DIM < PADDED:
        k = tl.load(k_places, mask=inside[None, :] & (at < DIM)[:, None], other=0.0)
        v = tl.load(v_places, mask=inside[:, None] & (at < DIM)[None, :], other=0.0)
    else:
        k = tl.load(k_places)
        v = tl.load(v_places)
    scores = dot(q, widen(k, q.dtype), tl.zeros((q.shape[0], KEYS), tl.float32)) * scale
    steps = page * strides[2][0] + head * strides[2][1] + slot
    if KIND[2]:
        scores *= tl.load(caches[2] + steps, mask=inside, other=0)[None, :]
    if KIND[1]:
        scores = tanh(scores / cap) * cap
    scores *= LOG2_E
    if MASKED:
        seen = inside[None, :] & (keys[None, :] <= positions[:, None])
        if WINDOW > 0:
            seen &= keys[None, :] > positions[:, None] - WINDOW
        scores = tl.where(seen, scores, float("-inf"))
    above = tl.maximum(top, tl.max(scores, 1))
    anchor = tl.where(above == float("-inf"), 0.0, above)
    weights = tl.exp2(scores - anchor[:, None])
    fade = tl.exp2(top - anchor)
    total = total * fade + tl.sum(weights, 1)
    if KIND[2]:
        weights *= tl.load(caches[3] + steps, mask=inside, other=0)[None, :]
    acc = dot(cast(weights, q.dtype), widen(v, q.dtype), acc * fade[:, None])
    return acc, above, total


@triton.jit
def _span(
    q,
    begin,
    end,
    lowest,
    highest,
    positions,
    head,
    blocks,
    caches,
    strides,
    scale,
    cap,
    KEYS: tl.constexpr,
    KIND: tl.constexpr,
):
    """Rows at ``lowest .. highest`` over keys ``begin .. end`` from a multiple of KEYS; edge tiles are masked."""
    WINDOW: tl.constexpr = KIND[0]
    PADDED: tl.constexpr = KIND[4]
    acc = tl.zeros((q.shape[0], PADDED), tl.float32)
    top = tl.full((q.shape[0],), float("-inf"), tl.float32)
    total = tl.zeros((q.shape[0],), tl.float32)
    plain = begin
    if WINDOW > 0:
        plain = tl.minimum(tl.maximum(begin, tl.cdiv(highest - WINDOW + 1, KEYS) * KEYS), tl.cdiv(end, KEYS) * KEYS)
        for n in range(begin, plain, KEYS):
            acc, top, total = _step(
                *(q, acc, top, total, n, end, positions, head, blocks, caches, strides, scale, cap, True, KEYS, KIND)
            )
    edge = tl.maximum(plain, tl.minimum(end, lowest + 1) // KEYS * KEYS)
    for n in range(plain, edge, KEYS):
        acc, top, total = _step(
            *(q, acc, top, total, n, end, positions, head, blocks, caches, strides, scale, cap, False, KEYS, KIND)
        )
    for n in range(edge, end, KEYS):
        acc, top, total = _step(
            *(q, acc, top, total, n, end, positions, head, blocks, caches, strides, scale, cap, True, KEYS, KIND)
        )
    return acc, top, total


@triton.jit
def _join(acc, top, total, acc2, top2, total2):
    """Two spans of the same rows as one."""
    above = tl.maximum(top, top2)
    anchor = tl.where(above == float("-inf"), 0.0, above)
    one, two = tl.exp2(top - anchor), tl.exp2(top2 - anchor)
    return acc * one[:, None] + acc2 * two[:, None], above, total * one + total2 * two


@triton.jit
def _owner(tile, query_start, requests, QUERIES: tl.constexpr):
    """The request of a tile. Request r's first is ``query_start[r] // QUERIES + r``: some past its end are empty."""
    low, high = 0, requests - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(query_start + middle) // QUERIES + middle <= tile:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit(do_not_specialize=["requests"])
def _attend(
    q,
    caches,
    out,
    parts,
    tops,
    totals,
    table,
    query_start,
    context_len,
    requests,
    table_row,
    q_row,
    q_head,
    strides,
    scale,
    cap,
    KIND: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SINGLE: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTITION: tl.constexpr,
):
    """``KIND``: window (0: none), capped, scaled, dim, padded dim, block size, packs of keys and of values."""
    WINDOW: tl.constexpr = KIND[0]
    DIM: tl.constexpr = KIND[3]
    PADDED: tl.constexpr = KIND[4]
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if SINGLE:
        request, skipped = tile, 0
        first_row = tl.load(query_start + request)
        count = 1
    else:
        request = _owner(tile, query_start, requests, QUERIES)
        first_row = tl.load(query_start + request)
        count = (tl.load(query_start + request + 1) - first_row).to(tl.int32)
        skipped = (tile - (first_row // QUERIES + request)).to(tl.int32) * QUERIES
        if skipped >= count:
            return
    context = tl.load(context_len + request).to(tl.int32)
    lowest = context - count + skipped
    end = tl.minimum(lowest + QUERIES, context)
    highest = end - 1

    index = tl.arange(0, ROWS)
    query, member = index // GROUP, index % GROUP
    positions = lowest + query
    valid = (positions <= highest) & (query < QUERIES)
    row = first_row + skipped + query
    at = tl.arange(0, PADDED)
    filled = valid[:, None] & (at < DIM)[None, :]
    places = row * q_row + (head * GROUP + member) * q_head
    tile_q = tl.load(q + places[:, None] + at[None, :], mask=filled, other=0)

    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(lowest - WINDOW + 1, 0) // KEYS * KEYS
    blocks = table + request.to(tl.int64) * table_row
    if PARTITION > 0 and SPLITS == 1:
        acc = tl.zeros((ROWS, PADDED), tl.float32)
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        for start in range(begin // PARTITION * PARTITION, end, PARTITION):
            acc2, top2, total2 = _span(
                *(tile_q, tl.maximum(begin, start), tl.minimum(end, start + PARTITION), lowest, highest, positions),
                *(head, blocks, caches, strides, scale, cap, KEYS, KIND),
            )
            acc, top, total = _join(acc, top, total, acc2, top2, total2)
    else:
        if SPLITS > 1:
            if PARTITION > 0:
                share = PARTITION
                start = split * PARTITION
            else:
                share = tl.cdiv(end - begin, SPLITS * KEYS) * KEYS
                start = begin + split * share
            end = tl.minimum(end, start + share)
            begin = tl.maximum(begin, start)
        acc, top, total = _span(
            tile_q, begin, end, lowest, highest, positions, head, blocks, caches, strides, scale, cap, KEYS, KIND
        )

    if SPLITS == 1:
        result = acc / total[:, None]
        places = (row * HEADS + head * GROUP + member)[:, None] * DIM + at[None, :]
        tl.store(out + places, cast(result, out.dtype.element_ty), mask=filled)
    else:
        slot = (row * HEADS + head * GROUP + member) * SPLITS + split
        tl.store(tops + slot, top, mask=valid)
        tl.store(totals + slot, total, mask=valid)
        if begin < end:
            tl.store(parts + slot[:, None] * PADDED + at[None, :], acc, mask=valid[:, None])


@triton.jit
def _merge(
    parts,
    tops,
    totals,
    out,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    ORDERED: tl.constexpr,
):
    """The splits of one row and head added; ``ORDERED``: one after the other, so that empty ones change no bit."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PADDED)
    if ORDERED:
        acc = tl.zeros((1, PADDED), tl.float32)
        top = tl.full((1,), float("-inf"), tl.float32)
        total = tl.zeros((1,), tl.float32)
        for split in range(SPLITS):
            slot = row * SPLITS + split + tl.arange(0, 1)
            top2 = tl.load(tops + slot)
            total2 = tl.load(totals + slot)
            acc2 = tl.load(parts + slot[:, None] * PADDED + at[None, :], mask=(top2 > float("-inf"))[:, None], other=0)
            acc, top, total = _join(acc, top, total, acc2, top2, total2)
        result = tl.sum(acc / total[:, None], 0)
    else:
        split = tl.arange(0, PADDED_SPLITS)
        slot = row * SPLITS + split
        top = tl.load(tops + slot, mask=split < SPLITS, other=float("-inf"))
        total = tl.load(totals + slot, mask=split < SPLITS, other=0)
        weight = tl.exp2(top - tl.max(top, 0))
        used = (top > float("-inf"))[:, None]
        acc = tl.load(parts + slot[:, None] * PADDED + at[None, :], mask=used, other=0)
        result = tl.sum(acc * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + row * DIM + at, cast(result, out.dtype.element_ty), mask=at < DIM)


@dataclass(frozen=True)
class Tiling:
    """``rows`` of a tile (queries times heads of a group), ``keys`` per step, ``splits`` of the keys: a power of two,
    since a kernel is compiled for each number of them."""

    rows: int
    keys: int
    splits: int
    warps: int
    stages: int


def tiling(
    n: int, requests: int, kv_heads: int, group: int, dim: int, capacity: int, kind: torch.dtype, processors: int
) -> Tiling:
    """For ``n`` queries of ``requests`` with up to ``capacity`` keys in a cache of ``kind``: tiles that were measured
    on this card, else guessed from the shapes."""
    decode, queries = n == requests, -(-n // requests)
    known, name = tuning.card(describe().card), str(kind).removeprefix("torch.")
    phase, count = ("decode", requests) if decode else ("prefill", queries)
    tile = known.find_attention(phase, name, group, dim, count) or tuning.guess_attention(queries, group, dim)
    tiles = (n if decode else n // max(1, tile.rows // group) + requests) * kv_heads
    splits = max(1, min(tile.waves * processors // tiles, -(-capacity // (4 * tile.keys)), MAX_SPLITS))
    return Tiling(tile.rows, tile.keys, 1 << (splits.bit_length() - 1), tile.warps, tile.stages)


def invariant_tiling(n: int, requests: int, group: int, dim: int, capacity: int, kind: torch.dtype) -> Tiling:
    """One tile for all shapes. Decode splits at partitions, prefill goes through them in the same order."""
    splits = pad(-(-capacity // PARTITION)) if n == requests else 1
    warps = 8 if dim > 128 or kind.itemsize == 1 else 4
    return Tiling(max(32, pad(group)), 64 if dim <= 128 else 32, splits, warps, 2)


def without_tensor_cores(tile: Tiling, group: int) -> Tiling:
    """``tile`` for float32 queries, whose products take registers for every key: as few as there can be."""
    return Tiling(max(16, pad(group)), 16, tile.splits, 4, 1)


def _over_codes(invariant: bool) -> Any:
    """The ops on caches of 8 bits: what is in them has a scale per token and head."""

    def paged_attention_codes(
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        k_scales: torch.Tensor,
        v_scales: torch.Tensor,
        block_table: torch.Tensor,
        query_start: torch.Tensor,
        context_len: torch.Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        batch = block_table, query_start, context_len
        return attend(q, (k_cache, v_cache), (k_scales, v_scales), batch, scale, window, softcap, invariant)

    return paged_attention_codes


def _over_floats(invariant: bool) -> Any:
    """The op on caches of floats."""

    def paged_attention(
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_table: torch.Tensor,
        query_start: torch.Tensor,
        context_len: torch.Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        batch = block_table, query_start, context_len
        return attend(q, (k_cache, v_cache), None, batch, scale, window, softcap, invariant)

    return paged_attention


for _backend, _invariant in ((FAST, False), (INVARIANT, True)):
    implement("paged_attention", _backend)(_over_floats(_invariant))
    for _kind in ("int8", "fp8"):
        implement(f"paged_attention_{_kind}", _backend)(_over_codes(_invariant))


def attend(
    q: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    scales: tuple[torch.Tensor, torch.Tensor] | None,
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    window: int | None,
    softcap: float | None,
    invariant: bool,
) -> torch.Tensor:
    """``scales`` (of 8-bit caches) [blocks, kv_heads, block_size]; ``batch``: block table, query starts, contexts."""
    q = dense_last(q)
    n, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not n:
        return out
    keys, values, size = key_places(cache[0]), value_places(cache[1]), block_size(cache[0])
    table, query_start, context_len = batch
    kv_heads, requests, capacity = cache[0].shape[1], len(context_len), table.shape[1] * size
    group, padded = heads // kv_heads, pad(dim, 16)
    if invariant:
        tile = invariant_tiling(n, requests, group, dim, capacity, cache[0].dtype)
    else:
        tile = tiling(n, requests, kv_heads, group, dim, capacity, cache[0].dtype, processors(q.device))
    if q.dtype == torch.float32:
        tile = without_tensor_cores(tile, group)
    queries = tile.rows // group
    shared = torch.empty(0, dtype=torch.float32, device=q.device)
    parts = shared if tile.splits == 1 else shared.new_empty(n * heads * tile.splits * padded)
    tops, totals = (shared if tile.splits == 1 else shared.new_empty(n * heads * tile.splits) for _ in range(2))
    _attend[(n if n == requests else n // queries + requests, kv_heads, tile.splits)](
        *(q, (*cache, *(scales or cache)), out, parts, tops, totals, table, query_start, context_len),
        *(requests, table.stride(0), q.stride(0), q.stride(1)),
        (keys.strides, values.strides, scales[0].stride()[:2] if scales else (0, 0)),
        *(scale, softcap or 1.0),
        KIND=(window or 0, softcap is not None, scales is not None, dim, padded, size, keys.pack, values.pack),
        HEADS=heads,
        GROUP=group,
        QUERIES=queries,
        ROWS=tile.rows,
        KEYS=tile.keys,
        SINGLE=n == requests,
        SPLITS=tile.splits,
        PARTITION=PARTITION if invariant else 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if tile.splits > 1:
        sizes = {"DIM": dim, "PADDED": padded, "SPLITS": tile.splits, "PADDED_SPLITS": pad(tile.splits)}
        _merge[(n * heads,)](parts, tops, totals, out, **sizes, ORDERED=invariant, num_warps=4)
    return out
