"""The weight as it is, in the tile order that the CPU kernels read."""

from __future__ import annotations

import torch

from tuili.ops.cpu import Arena, packed_embedding, packed_linear, packed_shape, unpack
from tuili.ops.cpu.store import store_floats
from tuili.quant.scheme import TILE, Scheme
from tuili.quant.weight import Tensors, Weight, formats


@formats.register("dense")
class Dense:
    def empty(self, out: int, into: int, scheme: Scheme, dtype: torch.dtype, arena: Arena) -> Tensors:
        return {"tiles": arena.empty(packed_shape(out, into, dtype), dtype)}

    def fill(self, weight: Weight, start: int, rows: torch.Tensor) -> None:
        tiles = weight.tensors["tiles"][start // TILE : -(-(start + len(rows)) // TILE)]
        store_floats(rows.to(weight.dtype), tiles)

    def dequant(self, weight: Weight) -> torch.Tensor:
        return unpack(weight.tensors["tiles"], weight.out, weight.into)

    def matmul(self, weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return packed_linear(x, weight.tensors["tiles"], weight.out, bias)

    def rows(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        return packed_embedding(weight.tensors["tiles"], weight.into, ids)
