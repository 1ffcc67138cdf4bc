"""The KV pool: K and V of every block of every layer, allocated once; as they are, or as bytes with scales."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable

import torch

from tuili.core.plan import BlockMove
from tuili.ops.kvcache import cache_shapes, key_shape, value_shape

#: ``--kv-cache-dtype`` where it is not the activations': codes that have a scale per token and head.
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class KVStore:
    """The tensors that attention reads, each with all layers' blocks: [layers, blocks, ...].

    Keys and values in the layouts of ``ops.kvcache``, a card's on a ``device`` that is one; for a pool of codes
    (``scaled``) also their scales, float32 [layers, blocks, kv_heads, block_size]. Zeroed, so that the padding of a
    block is never NaN; on the CPU by the operating system, page by page at first use, so that a large pool costs
    neither start-up time nor memory before it is needed.
    """

    def __init__(
        self,
        layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ):
        sizes = (num_blocks, block_size, kv_heads, head_dim)
        self.num_blocks, self.block_size, self.device = num_blocks, block_size, device
        self.scaled = dtype in CODES.values()
        shapes = (key_shape(*sizes, dtype), value_shape(*sizes, dtype)) if device is None else cache_shapes(*sizes)
        self.tensors = [self._zeros((layers, *shape), dtype) for shape in shapes]
        if self.scaled:
            scales = (layers, num_blocks, kv_heads, block_size)
            self.tensors += [self._zeros(scales, torch.float32) for _ in range(2)]

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return _untouched(shape, dtype) if self.device is None else torch.zeros(shape, dtype=dtype, device=self.device)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer: views [blocks, ...]."""
        return self.tensors[0][index], self.tensors[1][index]

    def scales(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Their scales, in a pool of codes: views [blocks, kv_heads, block_size]."""
        return self.tensors[2][index], self.tensors[3][index]

    def move(self, moves: Iterable[BlockMove]) -> None:
        """Copy blocks, in order."""
        for move in moves:
            for tensor in self.tensors:
                tensor[:, move.target] = tensor[:, move.source]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def _untouched(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that are untouched memory (``torch.zeros`` writes them out), on huge pages where there are some."""
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
