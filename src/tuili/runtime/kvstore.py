"""The KV pool: K and V of every block of every layer, allocated once."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch

from tuili.core.plan import BlockMove


class KVStore:
    """K and V [layers, blocks, block_size, kv_heads, head_dim].

    Zeroed, so that the padding of a block is never NaN; by the operating system, page by page at first use, so that a
    large pool costs neither start-up time nor memory before it is needed.
    """

    def __init__(self, layers: int, num_blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype):
        shape = (layers, num_blocks, block_size, kv_heads, head_dim)
        self.keys, self.values = _zeros(shape, dtype), _zeros(shape, dtype)
        self.block_size = block_size

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer: views [blocks, block_size, kv_heads, head_dim]."""
        return self.keys[index], self.values[index]

    def move(self, moves: Iterable[BlockMove]) -> None:
        """Copy blocks, in order."""
        for move in moves:
            self.keys[:, move.target] = self.keys[:, move.source]
            self.values[:, move.target] = self.values[:, move.source]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that are untouched memory (calloc), which ``torch.zeros`` writes out."""
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)
