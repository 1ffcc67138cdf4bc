"""The weight as it is, in the tile order that the CPU kernels read."""

from __future__ import annotations

from typing import ClassVar

import torch

from tuili.ops.cpu import packed_shape, unpack
from tuili.quant.place import Place
from tuili.quant.scheme import TILE, Scheme
from tuili.quant.weight import Codes, Tensors, Weight, formats


@formats.register("dense")
class Dense:
    tile: ClassVar = TILE

    def empty(self, out: int, into: int, scheme: Scheme, dtype: torch.dtype, place: Place) -> Tensors:
        return {"tiles": place.empty(packed_shape(out, into, dtype), dtype)}

    def fill(self, weight: Weight, start: int, rows: torch.Tensor) -> None:
        tiles = weight.tensors["tiles"][start // TILE : -(-(start + len(rows)) // TILE)]
        weight.kernels.store_floats(rows.to(weight.dtype), tiles)

    def fill_codes(self, weight: Weight, start: int, codes: Codes) -> None:
        raise TypeError("floats have no codes")

    def dequant(self, weight: Weight) -> torch.Tensor:
        return unpack(weight.tensors["tiles"], weight.out, weight.into)

    def matmul(self, weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return weight.kernels.packed_linear(x, weight.tensors["tiles"], weight.out, bias)

    def rows(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        return weight.kernels.packed_embedding(weight.tensors["tiles"], weight.out, weight.into, ids)
