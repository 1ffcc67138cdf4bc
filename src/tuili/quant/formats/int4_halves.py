"""4-bit weights as Triton's kernel reads them (``ops/triton/layouts.py``), repacked once at load in Marlin's manner.

Activations stay floats (W4A16), also where the scheme would round them: int4 products are not faster on a card, whose
tensor cores multiply what was unpacked.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from tuili.ops.cpu.store import round_int4
from tuili.ops.triton.layouts import (
    TILE,
    by_tile,
    int4_floats,
    pack_int4,
)
from tuili.quant.formats.int4_group import check_group, scale_dtype
from tuili.quant.place import Place
from tuili.quant.scheme import Scheme
from tuili.quant.weight import Codes, Tensors, Weight, formats


@formats.register("int4_halves")
class Int4Halves:
    tile: ClassVar = TILE

    def empty(self, out: int, into: int, scheme: Scheme, dtype: torch.dtype, place: Place) -> Tensors:
        check_group(scheme)
        tiles, groups = -(-out // TILE), -(-into // scheme.group)
        tensors = {
            "tiles": place.empty((tiles, groups, TILE, scheme.group // 2), torch.uint8),
            "scales": place.empty((tiles, groups, TILE), scale_dtype(scheme)),
        }
        return tensors if scheme.symmetric else tensors | {"zeros": place.empty((tiles, groups, TILE), torch.uint8)}

    def fill(self, weight: Weight, start: int, rows: torch.Tensor) -> None:
        self.fill_codes(weight, start, Codes(*round_int4(rows, weight.scheme.group, weight.scheme.symmetric)))

    def fill_codes(self, weight: Weight, start: int, codes: Codes) -> None:
        part = slice(start // TILE, -(-(start + len(codes.values)) // TILE))
        weight.tensors["tiles"][part] = pack_int4(codes.values, weight.scheme.group)
        weight.tensors["scales"][part] = by_tile(codes.scales)
        if codes.zeros is not None:
            weight.tensors["zeros"][part] = by_tile(codes.zeros)

    def dequant(self, weight: Weight) -> torch.Tensor:
        t = weight.tensors
        return int4_floats(t["tiles"], t["scales"], t.get("zeros"), weight.out, weight.into).to(weight.dtype)

    def matmul(self, weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        t = weight.tensors
        return weight.kernels.int4_weight_only_linear(x, t["tiles"], t["scales"], t.get("zeros"), weight.out, bias)

    def rows(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        t = weight.tensors
        return weight.kernels.int4_tile_embedding(
            ids, t["tiles"], t["scales"], t.get("zeros"), weight.into, weight.dtype
        )
