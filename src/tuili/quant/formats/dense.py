"""The weight as it is, in the tile order that the CPU kernels read: whole tiles of 16 outputs, bfloat16 by pairs of
inputs. It may be of 16 bits where activations are float32: then it is widened while it is multiplied."""

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
        dtype = scheme.dtype or dtype
        even, side = (1, 1) if dtype == "float32" else (2, 2) if dtype == "bfloat16" else (2, 1)
        return {"tiles": Stored((up(out, TILE), up(into, even) * even // side, TILE, side), dtype, TILE)}

    def store(self, weight: Weight, start: int, rows: torch.Tensor) -> None:
        tiles = weight.part("tiles", start, len(rows))
        weight.kernels.store_floats(rows.to(tiles.dtype), tiles)

    def dequant(self, weight: Weight) -> torch.Tensor:
        from tuili.ops.cpu.packed import unpack

        return unpack(weight.tensors["tiles"], weight.out, weight.into).to(weight.dtype)

    def matmul(self, weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return weight.kernels.packed_linear(x, weight.tensors["tiles"], weight.out, bias)

    def rows(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        return weight.kernels.packed_embedding(ids, weight.tensors["tiles"], weight.out, weight.into, weight.dtype)
