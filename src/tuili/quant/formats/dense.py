"""The weight as it is, in the tile order that the CPU kernels read: whole tiles of 16 outputs, bfloat16 by pairs of
inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuili.quant.formats import Stored, WeightFormat, formats, up
from tuili.quant.scheme import TILE, Scheme

if TYPE_CHECKING:
    import torch

    from tuili.quant.weight import Weight


@formats.register("dense")
class Dense(WeightFormat):
    numbers, packings, fast = ("dense",), ("cpu",), ("cpu",)

    def tensors(self, out: int, into: int, scheme: Scheme, dtype: str) -> dict[str, Stored]:
        pair = 2 if dtype == "bfloat16" else 1
        return {"tiles": Stored((up(out, TILE), up(into, pair), TILE, pair), dtype, TILE)}

    def store(self, weight: Weight, start: int, rows: torch.Tensor) -> None:
        weight.kernels.store_floats(rows.to(weight.dtype), weight.part("tiles", start, len(rows)))

    def dequant(self, weight: Weight) -> torch.Tensor:
        from tuili.ops.cpu.packed import unpack

        return unpack(weight.tensors["tiles"], weight.out, weight.into)

    def matmul(self, weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return weight.kernels.packed_linear(x, weight.tensors["tiles"], weight.out, bias)

    def rows(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        return weight.kernels.packed_embedding(weight.tensors["tiles"], weight.out, weight.into, ids)
