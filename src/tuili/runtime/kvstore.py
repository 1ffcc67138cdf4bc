"""The KV pool: K and V of every block of every layer, allocated once; as they are, or as bytes with scales."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Sequence

import torch

from tuili.core.plan import BlockMove
from tuili.layers.kvspec import KVSpec
from tuili.ops.kvcache import row_shapes, word_shapes
from tuili.runtime.device import Device

#: ``--kv-cache-dtype`` where it is not the activations': codes that have a scale per token and head.
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class KVStore:
    """The tensors that attention reads: of each layer, keys and values as its ``KVSpec`` says, [blocks, ...] each, in
    the layouts of ``ops.kvcache`` that the device reads best.

    Of codes (``scaled``) also their scales, float32 [blocks, heads, block_size]. Zeroed, so that the padding of a block
    is never NaN; on a processor by the operating system, page by page at first use, so that a large pool costs neither
    start-up time nor memory before it is needed.
    """

    def __init__(self, specs: Sequence[KVSpec], num_blocks: int, block_size: int, device: Device):
        self.specs, self.num_blocks, self.block_size, self.device = tuple(specs), num_blocks, block_size, device
        #: Of each layer: keys, values, and where they are codes the scales of both.
        self.layers = [self._allocate(spec) for spec in specs]

    def _allocate(self, spec: KVSpec) -> tuple[torch.Tensor, ...]:
        dtype = CODES.get(spec.dtype) or getattr(torch, spec.dtype)
        shapes = word_shapes if self.device.is_host else row_shapes
        sizes = self.num_blocks, self.block_size, spec.heads
        keys, values = shapes(*sizes, spec.key_dim, spec.value_dim, dtype)
        made = self._zeros(keys, dtype), self._zeros(values, dtype)
        scales = (self.num_blocks, spec.heads, self.block_size)
        return made + tuple(self._zeros(scales, torch.float32) for _ in range(2 if spec.scaled else 0))

    def _zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        on = self.device
        return _untouched(shape, dtype) if on.is_host else torch.zeros(shape, dtype=dtype, device=on.torch_device)

    def move(self, moves: Iterable[BlockMove]) -> None:
        """Copy blocks, in order."""
        for move in moves:
            for tensor in self.tensors:
                tensor[move.target] = tensor[move.source]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [tensor for layer in self.layers for tensor in layer]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def _untouched(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that are untouched memory (``torch.zeros`` writes them out), on huge pages where there are some."""
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
