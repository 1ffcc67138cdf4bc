"""How K and V lie in the paged cache: as the operands of attention's two products, so that nobody turns them again.

Queries times keys makes a number per key, weights times values one per dimension: what is made lies side by side, and
what is summed over lies in words, as in the tiles of a packed weight.
"""

from __future__ import annotations

import torch


def lanes(dtype: torch.dtype) -> int:
    """Values that a cache keeps side by side: what processors multiply as one word (one float, else a pair)."""
    return 1 if dtype.itemsize >= 4 else 2


def key_shape(blocks: int, block_size: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[int, ...]:
    """A cache of keys: [blocks, kv_heads, dim / p, block_size, p], p of ``lanes``: keys are a product's outputs.

    Neighbours along ``dim`` are a word; an odd ``dim`` is padded.
    """
    p = lanes(dtype)
    return blocks, kv_heads, -(-dim // p), block_size, p


def value_shape(blocks: int, block_size: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[int, ...]:
    """A cache of values: [blocks, kv_heads, block_size / p, dim, p], the other way: positions in words."""
    p = lanes(dtype)
    return blocks, kv_heads, -(-block_size // p), dim, p


Shapes = tuple[tuple[int, ...], tuple[int, ...]]


def word_shapes(blocks: int, block_size: int, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> Shapes:
    """Of keys and values as a processor reads them best: ``key_shape`` and ``value_shape``."""
    keys = key_shape(blocks, block_size, heads, key_dim, dtype)
    return keys, value_shape(blocks, block_size, heads, value_dim, dtype)


def row_shapes(blocks: int, block_size: int, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> Shapes:
    """Of keys and values as a card reads them best: each a row, the tokens of a block and head one piece of memory.

    The same layouts with other packs: all of ``key_dim`` in one, and a position per pack.
    """
    return (blocks, heads, 1, block_size, key_dim), (blocks, heads, block_size, value_dim, 1)


def cached_keys(k_cache: torch.Tensor, blocks: torch.Tensor, dim: int) -> torch.Tensor:
    """Keys of ``blocks`` [...] as plain rows: [..., block_size, kv_heads, dim]."""
    return k_cache[blocks].movedim((-2, -4), (-4, -3)).flatten(-2)[..., :dim]


def cached_values(v_cache: torch.Tensor, blocks: torch.Tensor, block_size: int) -> torch.Tensor:
    """Values of ``blocks`` [...] as plain rows: [..., block_size, kv_heads, dim]."""
    rows = v_cache[blocks].movedim(-1, -2).flatten(-3, -2)
    return rows[..., :block_size, :].movedim(-2, -3)
