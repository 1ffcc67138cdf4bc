"""Weights in the order in which kernels read them, and the two ops on them. The order is a tested bijection.

A packed matrix [outputs, inputs] is cut into tiles of 16 outputs. float32, float16: ``[tiles, inputs, 16, 1]``;
bfloat16: ``[tiles, ceil(inputs / 2), 16, 2]``, pairs of inputs side by side as the pair instruction takes them. Outputs
are padded with zero rows to whole tiles, inputs of 16 bits to whole pairs.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from tuili.ops import samples
from tuili.ops.cpu.contract import STORAGE
from tuili.ops.kernels import REFERENCE, Kernels
from tuili.ops.reference import linear
from tuili.ops.table import Sample, op

TILE = 16
#: Weights are placed in mappings of this many bytes: huge pages (2 MiB) need room to start and end on.
ARENA = 64 << 20


def shape(outputs: int, inputs: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """The packed shape of a matrix."""
    storage = STORAGE.get(str(dtype).removeprefix("torch."), STORAGE["float32"])
    return -(-outputs // TILE), -(-inputs // storage.even) * storage.even // storage.side, TILE, storage.side


def pack(weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``weight`` [outputs, inputs] as tiles, into ``out`` (of ``shape``) where given."""
    tiles, steps, _, pair = shape(*weight.shape, weight.dtype)  # type: ignore[call-arg]
    if out is None:
        out = torch.empty(tiles, steps, TILE, pair, dtype=weight.dtype)
    padded = F.pad(weight, (0, steps * pair - weight.shape[1], 0, tiles * TILE - weight.shape[0]))
    return out.copy_(padded.view(tiles, TILE, steps, pair).transpose(1, 2))


def unpack(tiles: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """The matrix [outputs, inputs] that was packed."""
    rows = tiles.transpose(1, 2).reshape(tiles.shape[0] * TILE, -1)
    return rows[:outputs, :inputs].contiguous()


def tile_rows(tiles: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows ``ids`` [n] of ``tiles`` [tiles, steps, 16, width]: [n, steps * width]."""
    return tiles[ids // TILE, :, ids % TILE].flatten(1)


class Arena:
    """Memory for weights, in large mappings on huge pages, 64-byte aligned; freed with the last tensor made in it."""

    packing, device = "cpu", torch.device("cpu")

    def __init__(self, kernels: Kernels = REFERENCE) -> None:
        self.kernels = kernels
        self._map: mmap.mmap | None = None
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized (zero) tensor."""
        count = 1
        for size in shape:
            count *= size
        bytes = count * dtype.itemsize
        if sys.platform != "linux" or bytes == 0:
            return torch.zeros(shape, dtype=dtype)
        if self._map is None or self._used + bytes > len(self._map):
            self._map = mmap.mmap(
                -1, max(ARENA, -(-bytes // ARENA) * ARENA), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )
            self._map.madvise(mmap.MADV_HUGEPAGE)
            self._used = 0
        tensor = torch.frombuffer(self._map, dtype=dtype, count=count, offset=self._used).view(shape)
        self._used += -(-bytes // 64) * 64
        return tensor

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` where the weights are: it is there."""
        return tensor


def each_storage(
    name: str, make: Callable[[torch.Generator, torch.dtype, torch.dtype], tuple[Any, ...]]
) -> list[Sample]:
    """A sample for each dtype of activations and of stored weights that are multiplied."""

    def at(dtype: str, storage: str) -> Sample:
        kinds = getattr(torch, dtype), getattr(torch, storage)
        return Sample(f"{name}-{dtype}-{storage}", lambda generator: (make(generator, *kinds), {}))

    return [at(dtype, storage) for storage, how in STORAGE.items() for dtype in how.dtypes]


def _linear_samples() -> list[Sample]:
    def args(
        g: torch.Generator, d: torch.dtype, storage: torch.dtype, rows: int, into: int, out: int, bias: bool
    ) -> tuple[Any, ...]:
        x, weight = samples.randn(g, rows, into, dtype=d), samples.randn(g, out, into, dtype=storage) / into**0.5
        return x, pack(weight), out, samples.randn(g, out, dtype=d) if bias else None

    shapes = ((1, 64, 96), (2, 128, 80), (3, 64, 96), (8, 256, 768), (17, 37, 41), (25, 96, 16), (129, 128, 64))
    deep = ((5, 1100, 33), (200, 1030, 40))  # of more inputs than a panel holds
    return [
        sample
        for rows, into, out in shapes + deep
        for sample in each_storage(
            f"{rows}x{into}x{out}",
            partial(args, rows=rows, into=into, out=out, bias=rows % 2 == 0),
        )
    ]


@op(_linear_samples, tolerance=1e-5)
def packed_linear(x: torch.Tensor, tiles: torch.Tensor, outputs: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``linear`` with a packed weight: ``x`` [rows, inputs] to [rows, outputs]. A weight of 16 bits is widened where
    ``x`` is float32: the sums are of floats."""
    return linear.reference(x, unpack(tiles, outputs, x.shape[-1]).to(x.dtype), bias)


def _embedding_samples() -> list[Sample]:
    def args(g: torch.Generator, d: torch.dtype, storage: torch.dtype) -> tuple[Any, ...]:
        weight = samples.randn(g, 100, 37, dtype=storage)
        return torch.randint(0, 100, (13,), generator=g), pack(weight), 100, 37, d

    return each_storage("ids", args)


@op(_embedding_samples)
def packed_embedding(
    ids: torch.Tensor, tiles: torch.Tensor, outputs: int, inputs: int, dtype: torch.dtype
) -> torch.Tensor:
    """``embedding`` from a packed weight: rows ``ids`` [n], below ``outputs``, of the matrix: [n, inputs] in
    ``dtype``."""
    return tile_rows(tiles, ids)[:, :inputs].to(dtype, memory_format=torch.contiguous_format)
