"""Where K and V lie in the paged cache, and the kernels that write them: alone, or while keys and queries are rotated.

A program takes all heads of one token. Bound by memory bandwidth; invariant, as every number is computed by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tuili.ops.rounding import LARGEST
from tuili.ops.triton.language import cast, whole
from tuili.ops.triton.rowwise import both, dense_last, pad, rotate_row, rotation, turned, warps


@dataclass(frozen=True)
class Places:
    """Addresses in a cache, in elements: ``strides`` and ``PACK``, the constant of ``key_place`` or ``value_place``.

    Strides of keys: block, head, token, pack of dimensions. Of values: block, head, pack of tokens, dimension.
    """

    strides: tuple[int, int, int, int]
    pack: int


def key_places(cache: torch.Tensor) -> Places:
    """``cache`` as ``kvcache.key_shape``; on a card best with all dimensions in one pack, so that a key is a row."""
    block, head, group, token, _ = cache.stride()
    return Places((block, head, token, group), cache.shape[4])


def value_places(cache: torch.Tensor) -> Places:
    """``cache`` as ``kvcache.value_shape``; on a card best with a token per pack, so that a value is a row."""
    block, head, group, dim, _ = cache.stride()
    return Places((block, head, group, dim), cache.shape[4])


def block_size(k_cache: torch.Tensor) -> int:
    return k_cache.shape[3]


@triton.jit
def key_place(page, slot, head, at, strides, PACK: tl.constexpr):
    """Offset of dimension ``at`` of the key in ``slot`` of block ``page``."""
    return page * strides[0] + head * strides[1] + slot * strides[2] + at // PACK * strides[3] + at % PACK


@triton.jit
def value_place(page, slot, head, at, strides, PACK: tl.constexpr):
    return page * strides[0] + head * strides[1] + slot // PACK * strides[2] + slot % PACK + at * strides[3]


@triton.jit
def _write_kv(
    k,
    v,
    k_cache,
    v_cache,
    slots,
    k_row,
    k_head,
    v_row,
    v_head,
    k_strides,
    v_strides,
    K_PACK: tl.constexpr,
    V_PACK: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(slots + row).to(tl.int64)
    page, slot = place // SIZE, place % SIZE
    head, at = tl.arange(0, PADDED_HEADS)[:, None], tl.arange(0, PADDED)[None, :]
    inside = (head < HEADS) & (at < DIM)
    keys = tl.load(k + row * k_row + head * k_head + at, mask=inside)
    tl.store(k_cache + key_place(page, slot, head, at, k_strides, K_PACK), keys, mask=inside)
    values = tl.load(v + row * v_row + head * v_head + at, mask=inside)
    tl.store(v_cache + value_place(page, slot, head, at, v_strides, V_PACK), values, mask=inside)


@both("write_kv")
def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    k, v = dense_last(k), dense_last(v)
    n, heads, dim = k.shape
    if n:
        _write_kv[(n,)](
            *(k, v, k_cache, v_cache, slots, k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
            **_sizes(k_cache, v_cache, heads),
            DIM=dim,
            PADDED=pad(dim),
            num_warps=warps(2 * pad(heads) * pad(dim)),
        )


@triton.jit
def _rounded(wide, LARGEST: tl.constexpr, dtype: tl.constexpr):
    """Heads [heads, dim] as codes, and their steps [heads]."""
    step = tl.div_rn(tl.max(tl.abs(wide), 1), LARGEST)
    exact = tl.div_rn(wide, tl.maximum(step, 1.1754943508222875e-38)[:, None])
    if dtype == tl.int8:
        exact = whole(exact)
    return cast(exact, dtype), step


@triton.jit
def _write_codes(
    k,
    v,
    k_cache,
    v_cache,
    k_scales,
    v_scales,
    slots,
    k_row,
    k_head,
    v_row,
    v_head,
    s_block,
    s_head,
    k_strides,
    v_strides,
    LARGEST: tl.constexpr,
    K_PACK: tl.constexpr,
    V_PACK: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(slots + row).to(tl.int64)
    page, slot = place // SIZE, place % SIZE
    heads = tl.arange(0, PADDED_HEADS)
    head, at = heads[:, None], tl.arange(0, PADDED)[None, :]
    inside = (head < HEADS) & (at < DIM)
    steps = page * s_block + heads * s_head + slot
    wide = tl.load(k + row * k_row + head * k_head + at, mask=inside, other=0).to(tl.float32)
    codes, step = _rounded(wide, LARGEST, k_cache.dtype.element_ty)
    tl.store(k_cache + key_place(page, slot, head, at, k_strides, K_PACK), codes, mask=inside)
    tl.store(k_scales + steps, step, mask=heads < HEADS)
    wide = tl.load(v + row * v_row + head * v_head + at, mask=inside, other=0).to(tl.float32)
    codes, step = _rounded(wide, LARGEST, v_cache.dtype.element_ty)
    tl.store(v_cache + value_place(page, slot, head, at, v_strides, V_PACK), codes, mask=inside)
    tl.store(v_scales + steps, step, mask=heads < HEADS)


@both("write_kv_int8")
@both("write_kv_fp8")
def write_kv_codes(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    k, v = dense_last(k), dense_last(v)
    n, heads, dim = k.shape
    if n:
        _write_codes[(n,)](
            *(k, v, k_cache, v_cache, k_scales, v_scales, slots),
            *(k.stride(0), k.stride(1), v.stride(0), v.stride(1), k_scales.stride(0), k_scales.stride(1)),
            **_sizes(k_cache, v_cache, heads),
            LARGEST=LARGEST[k_cache.dtype],
            DIM=dim,
            PADDED=pad(dim),
            num_warps=warps(2 * pad(heads) * pad(dim)),
        )


def _sizes(k_cache: torch.Tensor, v_cache: torch.Tensor, heads: int) -> dict[str, object]:
    keys, values = key_places(k_cache), value_places(v_cache)
    return {
        "k_strides": keys.strides,
        "v_strides": values.strides,
        "K_PACK": keys.pack,
        "V_PACK": values.pack,
        "SIZE": block_size(k_cache),
        "HEADS": heads,
        "PADDED_HEADS": pad(heads),
    }


@triton.jit
def _rotate_write_kv(
    q,
    k,
    v,
    cos,
    sin,
    k_cache,
    v_cache,
    slots,
    out,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    k_strides,
    v_strides,
    K_PACK: tl.constexpr,
    V_PACK: tl.constexpr,
    SIZE: tl.constexpr,
    Q_HEADS: tl.constexpr,
    PADDED_Q_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    REST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cos += row * HALF
    sin += row * HALF
    queries = out + row * Q_HEADS * DIM
    rotate_row(q + row * q_row, cos, sin, queries, q_head, Q_HEADS, PADDED_Q_HEADS, HALF, PADDED_HALF, DIM, REST)
    place = tl.load(slots + row).to(tl.int64)
    page, slot = place // SIZE, place % SIZE
    head, at = tl.arange(0, PADDED_HEADS)[:, None], tl.arange(0, PADDED_HALF)[None, :]
    one, two, inside = turned(k + row * k_row, cos, sin, k_head, HEADS, PADDED_HEADS, HALF, PADDED_HALF)
    dtype = k_cache.dtype.element_ty
    tl.store(k_cache + key_place(page, slot, head, at, k_strides, K_PACK), cast(one, dtype), mask=inside)
    tl.store(k_cache + key_place(page, slot, head, HALF + at, k_strides, K_PACK), cast(two, dtype), mask=inside)
    if REST > 0:
        past = 2 * HALF + tl.arange(0, REST)[None, :]
        inside = (head < HEADS) & (past < DIM)
        kept = tl.load(k + row * k_row + head * k_head + past, mask=inside)
        tl.store(k_cache + key_place(page, slot, head, past, k_strides, K_PACK), kept, mask=inside)
    at = tl.arange(0, PADDED)[None, :]
    inside = (head < HEADS) & (at < DIM)
    values = tl.load(v + row * v_row + head * v_head + at, mask=inside)
    tl.store(v_cache + value_place(page, slot, head, at, v_strides, V_PACK), values, mask=inside)


@both("rotate_write_kv")
def rotate_write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    q, k, v, cos, sin = dense_last(q), dense_last(k), dense_last(v), cos.contiguous(), sin.contiguous()
    n, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if n:
        sizes = rotation(heads, cos.shape[-1], dim)
        _rotate_write_kv[(n,)](
            *(q, k, v, cos, sin, k_cache, v_cache, slots, out),
            *(stride for x in (q, k, v) for stride in x.stride()[:2]),
            **_sizes(k_cache, v_cache, k.shape[1]),
            Q_HEADS=sizes.pop("HEADS"),
            PADDED_Q_HEADS=sizes.pop("PADDED_HEADS"),
            **sizes,
            PADDED=pad(dim),
            num_warps=warps(2 * pad(heads) * sizes["PADDED_HALF"]),
        )
    return out


@triton.jit
def _locate(
    inputs,
    last,
    table,
    ids,
    slots,
    contexts,
    blocks,
    input_row,
    columns,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    source = tl.load(inputs + row)
    position = tl.load(inputs + input_row + row)
    id = tl.load(inputs + 2 * input_row + row)
    known = tl.load(inputs + 3 * input_row + row)
    tl.store(ids + row, tl.where(known != 0, id, tl.load(last + source)))
    own = table + source * columns
    tl.store(slots + row, tl.load(own + position // SIZE) * SIZE + position % SIZE)
    tl.store(contexts + row, position + 1)
    for first in range(0, columns, BLOCK):
        at = first + tl.arange(0, BLOCK)
        copied = tl.load(own + at, mask=at < columns)
        tl.store(blocks + row.to(tl.int64) * columns + at, copied, mask=at < columns)


@both("locate")
def locate(
    inputs: torch.Tensor, last: torch.Tensor, table: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One program copies a row of the table: 8 bytes per block of the longest context that there may be."""
    inputs, last, table = dense_last(inputs), last.contiguous(), table.contiguous()
    n, columns = inputs.shape[1], table.shape[1]
    ids, slots, contexts = torch.empty(3, n, dtype=torch.long, device=inputs.device)
    blocks = torch.empty(n, columns, dtype=torch.long, device=inputs.device)
    if n:
        block = min(1024, pad(columns, 16))
        sizes = {"SIZE": block_size, "BLOCK": block, "num_warps": warps(2 * block)}
        _locate[(n,)](inputs, last, table, ids, slots, contexts, blocks, inputs.stride(0), columns, **sizes)
    return ids, slots, contexts, blocks
