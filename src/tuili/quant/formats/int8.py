"""8-bit weights, one scale per output; times activations that are rounded to int8 per row (W8A8), or not (W8A16)."""

from __future__ import annotations

from typing import ClassVar

import torch

from tuili.ops.cpu.integer import pack_int8, unpack_int8
from tuili.quant.place import Place
from tuili.quant.scheme import TILE, Scheme
from tuili.quant.weight import Codes, Tensors, Weight, formats


@formats.register("int8")
class Int8:
    tile: ClassVar = TILE

    def empty(self, out: int, into: int, scheme: Scheme, dtype: torch.dtype, place: Place) -> Tensors:
        tiles = place.empty((-(-out // TILE), -(-into // 4), TILE, 4), torch.uint8)
        return {"tiles": tiles, "scales": torch.empty(out)}

    def fill(self, weight: Weight, start: int, rows: torch.Tensor) -> None:
        weight.kernels.store_int8(rows, *self._part(weight, start, len(rows)))

    def fill_codes(self, weight: Weight, start: int, codes: Codes) -> None:
        tiles, scales = self._part(weight, start, len(codes.values))
        tiles.copy_(pack_int8(codes.values))
        scales.copy_(codes.scales[:, 0])

    def _part(self, weight: Weight, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        tiles = weight.tensors["tiles"][start // TILE : -(-(start + count) // TILE)]
        return tiles, weight.tensors["scales"][start : start + count]

    def dequant(self, weight: Weight) -> torch.Tensor:
        codes = unpack_int8(weight.tensors["tiles"], weight.out, weight.into)
        return (codes * weight.tensors["scales"].unsqueeze(1)).to(weight.dtype)

    def matmul(self, weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        kernels = weight.kernels
        linear = kernels.int8_weight_linear if weight.scheme.weight_only else kernels.int8_linear
        return linear(x, weight.tensors["tiles"], weight.tensors["scales"], weight.out, bias)

    def rows(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        return weight.kernels.int8_embedding(
            ids, weight.tensors["tiles"], weight.tensors["scales"], weight.into, weight.dtype
        )
