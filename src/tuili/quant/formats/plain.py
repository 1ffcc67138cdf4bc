"""The weight as it is, [out, in]: what cuBLAS multiplies."""

from __future__ import annotations

from typing import ClassVar

import torch

from tuili.quant.place import Place
from tuili.quant.scheme import TILE, Scheme
from tuili.quant.weight import Codes, Tensors, Weight, formats


@formats.register("plain")
class Plain:
    tile: ClassVar = TILE

    def empty(self, out: int, into: int, scheme: Scheme, dtype: torch.dtype, place: Place) -> Tensors:
        return {"matrix": place.empty((out, into), dtype)}

    def fill(self, weight: Weight, start: int, rows: torch.Tensor) -> None:
        weight.tensors["matrix"][start : start + len(rows)] = rows

    def fill_codes(self, weight: Weight, start: int, codes: Codes) -> None:
        raise TypeError("floats have no codes")

    def dequant(self, weight: Weight) -> torch.Tensor:
        return weight.tensors["matrix"]

    def matmul(self, weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return weight.kernels.linear(x, weight.tensors["matrix"], bias)

    def rows(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        return weight.kernels.embedding(weight.tensors["matrix"], ids)
