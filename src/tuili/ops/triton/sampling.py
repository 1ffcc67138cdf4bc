"""Choosing tokens, without sorting: a program does a row from end to end, so that rows do not see each other.

Scores are distances from the best, in units of the temperature: 0 is the best. Being positive, they are ordered as
their bits are, so that top_k and top_p are one search for the smallest distance within which enough ids, or enough of
the mass, lie: two bits of it per pass over the row. Bound by the row's passes through the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tuili.ops.triton.rowwise import both, dense_last, pad

#: Ids that a program looks at at once.
BLOCK = 4096
#: The most ids that are found one pass over the row each; for more, rows are sorted whole.
PASSES = 64
NOWHERE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _best(logits, vocab, BLOCK: tl.constexpr):
    """The highest of a row, the first id that has it, and whether it is finite."""
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    where, bad = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    for first in range(0, vocab, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(logits + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        bad += ((x != x) | (x == float("inf"))).to(tl.int32)
        better = x > high
        high, where = tl.where(better, x, high), tl.where(better, at, where)
    best = tl.max(high, 0)
    id = tl.min(tl.where(high == best, where, NOWHERE), 0)
    finite = (tl.sum(bad, 0) == 0) & (best > float("-inf"))
    return best, tl.where(finite, id, 0), finite


@triton.jit
def _weights(logits, at, vocab, best, inverse, limit, MASS: tl.constexpr):
    """Bits of the distances of ids ``at``, and the float64 weights of those within ``limit`` (1, or e^-distance)."""
    x = tl.load(logits + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    distance = (best - x) * inverse
    bits = distance.to(tl.uint32, bitcast=True)
    weight = tl.exp(-distance) if MASS else tl.full(distance.shape, 1.0, tl.float32)
    return bits, tl.where((bits <= limit) & (at < vocab), weight, 0.0).to(tl.float64)


@triton.jit
def _sum(logits, vocab, best, inverse, limit, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, vocab, BLOCK):
        _, weight = _weights(logits, first + tl.arange(0, BLOCK), vocab, best, inverse, limit, True)
        total += weight
    return tl.sum(total, 0)


@triton.jit
def _search(logits, vocab, best, inverse, limit, wanted, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Bits of the smallest distance within which ids of weight ``wanted`` lie."""
    found, unit = tl.cast(0, tl.uint32), tl.cast(1 << 30, tl.uint32)
    for _ in range(16):
        one = tl.zeros((BLOCK,), tl.float64)
        two = tl.zeros((BLOCK,), tl.float64)
        three = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, vocab, BLOCK):
            bits, weight = _weights(logits, first + tl.arange(0, BLOCK), vocab, best, inverse, limit, MASS)
            one += tl.where(bits < found + unit, weight, 0.0)
            two += tl.where(bits < found + unit * 2, weight, 0.0)
            three += tl.where(bits < found + unit * 3, weight, 0.0)
        short = (tl.sum(one, 0) < wanted).to(tl.uint32) + (tl.sum(two, 0) < wanted) + (tl.sum(three, 0) < wanted)
        found += unit * short
        unit = unit >> 2
    return found


@triton.jit
def _draw(
    logits,
    inverses,
    floors,
    top_k,
    top_p,
    uniform,
    ids,
    finite,
    vocab,
    row_stride,
    DRAWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row. ``inverses``: of the temperature, 0 for greedy; ``floors``: the distance that min_p allows."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    best, id, fine = _best(logits, vocab, BLOCK)
    tl.store(finite + row, fine.to(tl.uint8))
    tl.store(ids + row, id.to(tl.int64))
    if DRAWS:
        inverse = tl.load(inverses + row)
        if fine & (inverse > 0):
            limit = tl.load(floors + row).to(tl.uint32, bitcast=True)
            k, p = tl.load(top_k + row), tl.load(top_p + row)
            if (k > 0) & (k < vocab):
                wanted = k.to(tl.float64)
                limit = tl.minimum(limit, _search(logits, vocab, best, inverse, limit, wanted, False, BLOCK))
            if p < 1:
                wanted = p.to(tl.float64) * _sum(logits, vocab, best, inverse, limit, BLOCK)
                limit = tl.minimum(limit, _search(logits, vocab, best, inverse, limit, wanted, True, BLOCK))
            target = tl.load(uniform + row) * _sum(logits, vocab, best, inverse, limit, BLOCK)
            before = tl.cast(0, tl.float64)
            chosen = tl.cast(NOWHERE, tl.int32)
            for first in range(0, vocab, BLOCK):
                at = first + tl.arange(0, BLOCK)
                _, weight = _weights(logits, at, vocab, best, inverse, limit, True)
                past = (before + tl.cumsum(weight, 0) > target) & (weight > 0)
                chosen = tl.minimum(chosen, tl.min(tl.where(past, at, NOWHERE), 0))
                before += tl.sum(weight, 0)
            # Rounding may leave the target at the sum of all: then the best id is as right as any.
            tl.store(ids + row, tl.where(chosen < NOWHERE, chosen, id).to(tl.int64))


def _launch(logits: torch.Tensor, *settings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = dense_last(logits)
    rows, vocab = logits.shape
    ids = torch.empty(rows, dtype=torch.long, device=logits.device)
    finite = torch.empty(rows, dtype=torch.uint8, device=logits.device)
    if rows:
        others, sizes = settings or (ids,) * 5, {"DRAWS": bool(settings), **_block(vocab)}
        _draw[(rows,)](logits, *others, ids, finite, vocab, logits.stride(0), **sizes)
    return ids, finite.bool()


def _block(vocab: int) -> dict[str, int]:
    """How much of a row a program looks at at once, and with how many warps."""
    block = min(BLOCK, pad(vocab, 16))
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 256))}


@both("argmax")
def argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch(logits)


@both("draw")
def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    min_p: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    uniform: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    inverse = torch.where(temperature > 0, 1 / temperature, torch.zeros_like(temperature))
    return _launch(logits, inverse, -torch.log(min_p), top_k, top_p, uniform)


@triton.jit
def _next(logits, vocab, value, id, BLOCK: tl.constexpr):
    """The highest of a row behind ``value`` at ``id``, in falling order and of equals by rising id; and its id."""
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.full((BLOCK,), NOWHERE, tl.int32)
    for first in range(0, vocab, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(logits + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        behind = (at < vocab) & ((x < value) | ((x == value) & (at > id)))
        better = behind & ((x > high) | (where == NOWHERE))
        high, where = tl.where(better, x, high), tl.where(better, at, where)
    best = tl.max(high, 0)
    return best, tl.min(tl.where(high == best, where, NOWHERE), 0)


@triton.jit(do_not_specialize=["count"])
def _logprobs(logits, tokens, values, ranks, norms, tops, ids, vocab, row_stride, count, BLOCK: tl.constexpr):
    """One row: ``norms`` is what is taken from a logit to make it a log-probability, nan where one is not finite."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    best, _, fine = _best(logits, vocab, BLOCK)
    own = tl.load(logits + tl.load(tokens + row)).to(tl.float32)
    total, higher = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.int32)
    for first in range(0, vocab, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(logits + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        total += tl.exp(x - best)
        higher += (x > own).to(tl.int32)
    norm = tl.where(fine, best + tl.log(tl.sum(total, 0)), float("nan"))
    tl.store(values + row, own - norm)
    tl.store(ranks + row, tl.sum(higher, 0).to(tl.int64) + 1)
    tl.store(norms + row, norm)
    if fine:
        value, id = float("inf"), -1
        for place in range(count):
            value, id = _next(logits, vocab, value, id, BLOCK)
            tl.store(tops + row * count + place, value - norm)
            tl.store(ids + row * count + place, id.to(tl.int64))


@both("logprobs")
def logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    logits, tokens = dense_last(logits), tokens.contiguous()
    rows, vocab = logits.shape
    values, norms = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    ranks = tokens.new_empty(rows, dtype=torch.long)
    passes = count if count <= PASSES else 0
    tops = logits.new_full((rows, passes), torch.nan, dtype=torch.float32)
    ids = torch.zeros(rows, passes, dtype=torch.long, device=logits.device)
    if rows:
        sizes = vocab, logits.stride(0), passes
        _logprobs[(rows,)](logits, tokens, values, ranks, norms, tops, ids, *sizes, **_block(vocab))
    if count > passes:
        found = logits.float().sort(dim=-1, descending=True, stable=True)
        tops, ids = found.values[:, :count] - norms.unsqueeze(1), found.indices[:, :count]
    return values, ranks, tops, ids
