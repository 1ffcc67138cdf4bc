"""8-bit weights, one scale per output, times activations that are rounded to int8 per row (W8A8)."""

from __future__ import annotations

import torch

from tuili.ops.cpu import Arena, int8_linear
from tuili.ops.cpu.integer import pack_int8, unpack_int8
from tuili.ops.cpu.packed import TILE, tile_rows
from tuili.quant.rounding import round_int8
from tuili.quant.scheme import Scheme
from tuili.quant.weight import Codes, Tensors, formats


@formats.register("int8")
class Int8:
    def empty(self, out: int, into: int, scheme: Scheme, dtype: torch.dtype, arena: Arena) -> Tensors:
        tiles = arena.empty((-(-out // TILE), -(-into // 4), TILE, 4), torch.uint8)
        return {"tiles": tiles, "scales": torch.empty(out), "like": torch.empty(0, dtype=dtype)}

    def pack(self, codes: Codes, scheme: Scheme, tensors: Tensors) -> None:
        if codes.scales is None:
            codes = round_int8(codes.values)
        assert codes.scales is not None
        tensors["tiles"].copy_(pack_int8(codes.values))
        tensors["scales"].copy_(codes.scales[:, 0])

    def dequant(self, tensors: Tensors, scheme: Scheme, out: int, into: int) -> torch.Tensor:
        codes = unpack_int8(tensors["tiles"], out, into)
        return (codes * tensors["scales"].unsqueeze(1)).to(tensors["like"].dtype)

    def matmul(
        self, x: torch.Tensor, tensors: Tensors, scheme: Scheme, out: int, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return int8_linear(x, tensors["tiles"], tensors["scales"], out, bias)

    def rows(self, ids: torch.Tensor, tensors: Tensors, scheme: Scheme, into: int) -> torch.Tensor:
        codes = tile_rows(tensors["tiles"], ids)[:, :into].float() - 128
        return (codes * tensors["scales"][ids].unsqueeze(1)).to(tensors["like"].dtype)
