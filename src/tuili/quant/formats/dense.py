"""The weight as it is, in the tile order that the CPU kernels read."""

from __future__ import annotations

import torch

from tuili.ops.cpu import Arena, pack, packed_embedding, packed_linear, packed_shape, unpack
from tuili.quant.scheme import Scheme
from tuili.quant.weight import Codes, Tensors, formats


@formats.register("dense")
class Dense:
    def empty(self, out: int, into: int, scheme: Scheme, dtype: torch.dtype, arena: Arena) -> Tensors:
        return {"tiles": arena.empty(packed_shape(out, into, dtype), dtype)}

    def pack(self, codes: Codes, scheme: Scheme, tensors: Tensors) -> None:
        pack(codes.values, tensors["tiles"])

    def dequant(self, tensors: Tensors, scheme: Scheme, out: int, into: int) -> torch.Tensor:
        return unpack(tensors["tiles"], out, into)

    def matmul(
        self, x: torch.Tensor, tensors: Tensors, scheme: Scheme, out: int, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return packed_linear(x, tensors["tiles"], out, bias)

    def rows(self, ids: torch.Tensor, tensors: Tensors, scheme: Scheme, into: int) -> torch.Tensor:
        return packed_embedding(tensors["tiles"], into, ids)
