"""8-bit weights, one scale per output; times activations that are rounded to int8 per row (W8A8), or not (W8A16)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuili.quant.formats import Stored, Tensors, WeightFormat, formats, up
from tuili.quant.scheme import TILE, Scheme

if TYPE_CHECKING:
    import torch

    from tuili.quant.weight import Codes, Weight


@formats.register("int8")
class Int8(WeightFormat):
    numbers, packings, fast = ("int8",), ("cpu",), ("cpu",)

    def takes(self, scheme: Scheme, packing: str) -> bool:
        return super().takes(scheme, packing) and not scheme.group and scheme.symmetric

    def tensors(self, out: int, into: int, scheme: Scheme, dtype: str) -> dict[str, Stored]:
        tiles = Stored((up(out, TILE), up(into, 4), TILE, 4), "uint8", TILE)
        return {"tiles": tiles, "scales": Stored((out,), "float32")}

    def pack(self, codes: Codes, scheme: Scheme) -> Tensors:
        from tuili.ops.cpu.integer import pack_int8

        return {"tiles": pack_int8(codes.values), "scales": codes.scales[:, 0]}

    def store(self, weight: Weight, start: int, rows: torch.Tensor) -> None:
        """In one pass: the codes are those of ``quant.round``."""
        weight.kernels.store_int8(rows, *(weight.part(name, start, len(rows)) for name in ("tiles", "scales")))

    def dequant(self, weight: Weight) -> torch.Tensor:
        from tuili.ops.cpu.integer import unpack_int8

        codes = unpack_int8(weight.tensors["tiles"], weight.out, weight.into)
        return (codes * weight.tensors["scales"].unsqueeze(1)).to(weight.dtype)

    def matmul(self, weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        kernels = weight.kernels
        linear = kernels.int8_weight_linear if weight.scheme.weight_only else kernels.int8_linear
        return linear(x, weight.tensors["tiles"], weight.tensors["scales"], weight.out, bias)

    def rows(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        t = weight.tensors
        return weight.kernels.int8_embedding(ids, t["tiles"], t["scales"], weight.into, weight.dtype)
