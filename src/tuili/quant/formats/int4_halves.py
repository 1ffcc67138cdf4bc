"""4-bit weights as Triton's kernel reads them (``ops/triton/layouts.py``), repacked once at load in Marlin's manner.

Activations stay floats (W4A16), also where the scheme would round them: int4 products are not faster on a card, whose
tensor cores multiply what was unpacked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuili.quant.formats import Stored, Tensors, WeightFormat, formats, up
from tuili.quant.formats.int4_group import group_numbers, groups_of
from tuili.quant.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from tuili.quant.weight import Codes, Weight

#: Outputs of a tile (``layouts.TILE``).
LINES = 64


@formats.register("int4_halves")
class Int4Halves(WeightFormat):
    numbers, packings, fast = ("int4",), ("triton",), ("triton",)
    tile = LINES

    def tensors(self, out: int, into: int, scheme: Scheme, dtype: str) -> dict[str, Stored]:
        groups = groups_of(into, scheme)
        tiles = Stored((up(out, LINES), groups, LINES, scheme.group // 2), "uint8", LINES)
        return {"tiles": tiles, **group_numbers((up(out, LINES), groups, LINES), scheme)}

    def pack(self, codes: Codes, scheme: Scheme) -> Tensors:
        from tuili.ops.triton.layouts import by_tile, pack_int4

        packed = {"tiles": pack_int4(codes.values, scheme.group), "scales": by_tile(codes.scales)}
        return packed if codes.zeros is None else packed | {"zeros": by_tile(codes.zeros)}

    def dequant(self, weight: Weight) -> torch.Tensor:
        from tuili.ops.triton.layouts import int4_floats

        t = weight.tensors
        return int4_floats(t["tiles"], t["scales"], t.get("zeros"), weight.out, weight.into).to(weight.dtype)

    def matmul(self, weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        t = weight.tensors
        return weight.kernels.int4_weight_only_linear(x, t["tiles"], t["scales"], t.get("zeros"), weight.out, bias)

    def rows(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        t, size = weight.tensors, weight.into
        return weight.kernels.int4_tile_embedding(ids, t["tiles"], t["scales"], t.get("zeros"), size, weight.dtype)
