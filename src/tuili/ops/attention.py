"""What attention means: over the paged KV cache (inference), and dense and causal (training).

The paged reference is invariant, bit for bit, to batch, chunking, prefix reuse and padding of the block table (law 5):
keys are cut into tiles at absolute positions, each tile is one matmul of fixed shape, and tiles are added in a fixed
pairwise tree, to which masked tiles contribute exact zeros.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tuili.ops import samples
from tuili.ops.kvcache import cached_keys, cached_values
from tuili.ops.reference import ROW_TILE, rotate, softcap
from tuili.ops.rounding import LARGEST
from tuili.ops.table import Backend, op

#: Keys per tile. Part of the meaning: another value gives other last bits.
KEY_TILE = 64
#: Queries attended at once; bounds the memory of a long prefill.
QUERY_SLICE = 256
#: Smallest step of int8 keys and values that is divided by: a head of zeros has step 0.
TINY = torch.finfo(torch.float32).tiny


@op(samples.write_kv)
def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Store ``k``, ``v`` [n, kv_heads, dim] at ``slots`` [n] (block * block_size + offset) of the caches, in place.

    Caches are laid out as ``kvcache.key_shape`` and ``value_shape`` say.
    """
    size, p = k_cache.shape[-2:]
    block, offset = slots // size, slots % size
    k_cache[block, :, :, offset] = F.pad(k, (0, -k.shape[-1] % p)).unflatten(-1, (-1, p)).to(k_cache.dtype)
    p = v_cache.shape[-1]
    v_cache[block, :, offset // p, :, offset % p] = v.to(v_cache.dtype)


@op(samples.write_kv_int8)
def write_kv_int8(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """``write_kv`` into int8 caches: each head of each token is ``codes * scale``, its largest value is 127 steps.

    Scales are float32 [blocks, kv_heads, block_size]. No value is off by more than half a step (``scale / 2``).
    """
    _write_codes(k, v, k_cache, v_cache, k_scales, v_scales, slots)


@op(samples.write_kv_fp8)
def write_kv_fp8(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """As ``write_kv_int8``, into caches of float8 E4M3: the largest value of a head is 448 steps."""
    _write_codes(k, v, k_cache, v_cache, k_scales, v_scales, slots)


def _write_codes(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    block, offset = slots // k_scales.shape[-1], slots % k_scales.shape[-1]
    for x, scales in ((k, k_scales), (v, v_scales)):
        scales[block, :, offset] = x.float().abs().amax(-1) / LARGEST[k_cache.dtype]
    keys, values = (_codes(x, s[block, :, offset], k_cache.dtype) for x, s in ((k, k_scales), (v, v_scales)))
    # As bytes: torch pads and scatters no float8.
    write_kv.reference(keys, values, k_cache.view(torch.int8), v_cache.view(torch.int8), slots)


def _codes(x: torch.Tensor, steps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` [n, kv_heads, dim] in ``steps`` [n, kv_heads], rounded to ``dtype``: its bytes."""
    exact = x.float() / steps.clamp(min=TINY).unsqueeze(-1)
    return exact.round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else exact.to(dtype).view(torch.int8)


def _rotate_then_write(
    kernels: Backend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    kernels.write_kv(kernels.rotate(k, cos, sin), v, k_cache, v_cache, slots)
    return kernels.rotate(q, cos, sin)


@op(samples.rotate_write_kv, tolerance=1e-5, parts=_rotate_then_write)
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
    """``rotate`` of ``q`` (returned) and ``k``, and ``write_kv`` of the rotated k and v, in one pass over memory."""
    write_kv.reference(rotate.reference(k, cos, sin), v, k_cache, v_cache, slots)
    return rotate.reference(q, cos, sin)


@op(samples.paged_attention, tolerance=1e-5)
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
    """Causal attention of each request's last queries over its cached context: [n, heads, dim] in q's dtype.

    ``q`` [n, heads, dim]: the queries of all requests end to end, request r's are rows
    ``query_start[r] .. query_start[r + 1]`` and the last positions of its ``context_len[r]`` (their K and V are already
    in the caches). ``block_table`` [requests, blocks] lists block ids; entries past the context are ignored but must be
    valid ids. A query sees itself and the ``window - 1`` positions before it (None: all). Kwon et al. 2023,
    arXiv:2309.06180.
    """
    size = k_cache.shape[-2]

    def rows(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return cached_keys(k_cache, blocks, q.shape[-1]).float(), cached_values(v_cache, blocks, size).float()

    return _paged(q, rows, size, block_table, query_start, context_len, (scale, window, softcap))


@op(samples.paged_attention_int8, tolerance=1e-4)
def paged_attention_int8(
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
    """``paged_attention`` over what ``write_kv_int8`` stored. Others may round queries and weights to 15 bits."""
    rows = _coded_rows(k_cache, v_cache, k_scales, v_scales, q.shape[-1])
    return _paged(q, rows, k_cache.shape[-2], block_table, query_start, context_len, (scale, window, softcap))


@op(samples.paged_attention_fp8, tolerance=1e-4)
def paged_attention_fp8(
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
    """``paged_attention`` over what ``write_kv_fp8`` stored."""
    rows = _coded_rows(k_cache, v_cache, k_scales, v_scales, q.shape[-1])
    return _paged(q, rows, k_cache.shape[-2], block_table, query_start, context_len, (scale, window, softcap))


#: Gives plain float32 K and V of blocks [r, blocks]: [r, blocks, block_size, kv_heads, dim] each.
Rows = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
#: Scale, window, soft cap.
Kind = tuple[float, int | None, float | None]


def _coded_rows(
    k_cache: torch.Tensor, v_cache: torch.Tensor, k_scales: torch.Tensor, v_scales: torch.Tensor, dim: int
) -> Rows:
    """K and V of caches that hold codes with a step per token and head."""
    kind = k_cache.dtype

    def rows(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Gathering bytes and floats is all the same, but torch gathers no float8.
        keys = cached_keys(k_cache.view(torch.int8), blocks, dim).view(kind)
        values = cached_values(v_cache.view(torch.int8), blocks, k_cache.shape[-2]).view(kind)
        k_steps, v_steps = (s[blocks].transpose(-1, -2).unsqueeze(-1) for s in (k_scales, v_scales))
        return keys.float() * k_steps, values.float() * v_steps

    return rows


def _paged(
    q: torch.Tensor,
    rows_of: Rows,
    size: int,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    kind: Kind,
) -> torch.Tensor:
    starts, contexts = query_start.tolist(), context_len.tolist()
    counts = query_start.diff().tolist()
    out = torch.empty_like(q)
    single = [r for r, count in enumerate(counts) if count == 1]
    if single:
        rows = query_start[:-1][single] if len(single) < len(counts) else query_start[:-1]
        last = (context_len[single] - 1).unsqueeze(1)
        blocks = -(-max(contexts[r] for r in single) // size)
        out[rows] = _attend(q[rows].unsqueeze(1), last, *rows_of(block_table[single, :blocks]), kind).squeeze(1)
    for r, count in enumerate(counts):
        if count == 1:
            continue
        for first in range(0, count, QUERY_SLICE):
            width = min(QUERY_SLICE, count - first)
            begin = contexts[r] - count + first
            at = torch.arange(begin, begin + width, device=q.device).unsqueeze(0)
            table = block_table[r : r + 1, : -(-(begin + width) // size)]
            part = slice(starts[r] + first, starts[r] + first + width)
            out[part] = _attend(q[part].unsqueeze(0), at, *rows_of(table), kind)[0]
    return out


def _attend(q: torch.Tensor, at: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, kind: Kind) -> torch.Tensor:
    """``q`` [r, n, heads, dim] at positions ``at`` [r, n] over [r, blocks, block_size, kv_heads, dim], in float32."""
    scale, window, cap = kind
    r, n, heads, dim = q.shape
    kv_heads = keys.shape[-2]
    group = heads // kv_heads
    keys, values = _tiles(keys), _tiles(values)
    tiles = keys.shape[2]
    # A weight of zero does not hide what an earlier owner left past the last query: 0 x nan is nan.
    unread = torch.arange(tiles * KEY_TILE, device=at.device).view(tiles, KEY_TILE) > at.amax(1).view(-1, 1, 1)
    values.masked_fill_(unread.view(r, 1, tiles, KEY_TILE, 1), 0)
    wide = q.float().view(r, n, kv_heads, group, dim).transpose(1, 2).reshape(r, kv_heads, n * group, dim)
    wide = F.pad(wide * scale, (0, 0, 0, -(n * group) % ROW_TILE))
    rows = wide.shape[2]
    wide = wide.unsqueeze(2).expand(-1, -1, tiles, -1, -1)
    scores = torch.matmul(wide, keys.transpose(-1, -2))
    if cap is not None:
        scores = softcap(scores, cap)
    hidden = _hidden(at, tiles, window).repeat_interleave(group, 2)
    hidden = F.pad(hidden, (0, 0, 0, rows - n * group))
    scores.masked_fill_(hidden.unsqueeze(1), -torch.inf)
    top = scores.amax((2, 4), keepdim=True)
    weights = torch.exp(scores - top)
    total = _tree_sum(weights.sum(-1, keepdim=True))
    out = _tree_sum(torch.matmul(weights, values)) / total
    out = out[:, :, : n * group].view(r, kv_heads, n, group, dim).transpose(1, 2)
    return out.reshape(r, n, heads, dim).to(q.dtype)


def _tiles(rows: torch.Tensor) -> torch.Tensor:
    """Rows [r, blocks, block_size, kv, dim] cut at absolute positions: [r, kv, tiles, KEY_TILE, dim]."""
    rows = rows.flatten(1, 2)
    rows = F.pad(rows, (0, 0, 0, 0, 0, -rows.shape[1] % KEY_TILE))
    return rows.unflatten(1, (-1, KEY_TILE)).permute(0, 3, 1, 2, 4).contiguous()


def _hidden(at: torch.Tensor, tiles: int, window: int | None) -> torch.Tensor:
    """True where a query at ``at`` [r, n] must not look: [r, tiles, n, KEY_TILE]."""
    key = torch.arange(tiles * KEY_TILE, device=at.device).view(1, tiles, 1, KEY_TILE)
    query = at.view(at.shape[0], 1, -1, 1)
    hidden = key > query
    return hidden if window is None else hidden | (key <= query - window)


def _tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over dim 2 by adding neighbours, level by level: trailing zero tiles never change the result's bits."""
    while x.shape[2] > 1:
        if x.shape[2] % 2:
            x = torch.cat((x, torch.zeros_like(x[:, :, :1])), 2)
        x = x[:, :, 0::2] + x[:, :, 1::2]
    return x.squeeze(2)


@op(samples.causal_attention, tolerance=1e-5)
def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Dense causal attention of whole sequences, for training.

    ``q`` [b, t, heads, dim], ``k``, ``v`` [b, t, kv_heads, dim]. Differentiable; [b, t, heads, dim] in q's dtype.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if window is None and softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q.float() @ k.float().transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    at = torch.arange(q.shape[2], device=q.device)
    hidden = at[None, :] > at[:, None]
    if window is not None:
        hidden |= at[None, :] <= at[:, None] - window
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ v.float()).to(q.dtype).transpose(1, 2)
