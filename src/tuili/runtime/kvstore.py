"""The KV pool: K and V of every block of every layer, allocated once; as they are, or as int8 with a scale per head."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable

import torch

from tuili.core.plan import BlockMove
from tuili.ops.kvcache import key_shape, value_shape


class KVStore:
    """The tensors that attention reads, each with all layers' blocks: [layers, blocks, ...].

    Keys and values in the layouts of ``ops.kvcache``; for a pool of int8 also their scales, float32
    [layers, blocks, kv_heads, block_size]. Zeroed, so that the padding of a block is never NaN; by the operating
    system, page by page at first use, so that a large pool costs neither start-up time nor memory before it is needed.
    """

    def __init__(self, layers: int, num_blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype):
        sizes = (num_blocks, block_size, kv_heads, head_dim, dtype)
        self.tensors = [_zeros((layers, *shape(*sizes)), dtype) for shape in (key_shape, value_shape)]
        if dtype == torch.int8:
            self.tensors += [_zeros((layers, num_blocks, kv_heads, block_size), torch.float32) for _ in range(2)]
        self.block_size = block_size
        self.int8 = dtype == torch.int8

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer: views [blocks, ...]."""
        return self.tensors[0][index], self.tensors[1][index]

    def scales(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Their scales, in an int8 pool: views [blocks, kv_heads, block_size]."""
        return self.tensors[2][index], self.tensors[3][index]

    def move(self, moves: Iterable[BlockMove]) -> None:
        """Copy blocks, in order."""
        for move in moves:
            for tensor in self.tensors:
                tensor[:, move.target] = tensor[:, move.source]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that are untouched memory (``torch.zeros`` writes them out), on huge pages where there are some."""
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
