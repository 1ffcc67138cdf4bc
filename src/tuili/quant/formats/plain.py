"""The weight as it is, [out, in]: what cuBLAS multiplies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuili.quant.formats import Stored, WeightFormat, formats
from tuili.quant.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from tuili.quant.weight import Weight


@formats.register("plain")
class Plain(WeightFormat):
    numbers, packings, fast = ("dense",), ("triton",), ("triton",)

    def tensors(self, out: int, into: int, scheme: Scheme, dtype: str) -> dict[str, Stored]:
        return {"matrix": Stored((out, into), scheme.dtype or dtype)}

    def store(self, weight: Weight, start: int, rows: torch.Tensor) -> None:
        weight.part("matrix", start, len(rows)).copy_(rows)

    def dequant(self, weight: Weight) -> torch.Tensor:
        return weight.tensors["matrix"]

    def matmul(self, weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return weight.kernels.linear(x, weight.tensors["matrix"], bias)

    def rows(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        return weight.kernels.embedding(weight.tensors["matrix"], ids)
