"""4-bit weights, a float16 scale (not symmetric: and a zero point) per group of inputs; int8 activations (W4A8), or
floats (W4A16)."""

from __future__ import annotations

from typing import ClassVar

import torch

from tuili.base.errors import ConfigError
from tuili.ops.cpu.integer import by_output, by_tile, pack_int4, unpack_int4
from tuili.ops.cpu.store import int4_floats
from tuili.quant.place import Place
from tuili.quant.scheme import GROUPS, TILE, Scheme
from tuili.quant.weight import Codes, Tensors, Weight, formats


@formats.register("int4")
class Int4:
    tile: ClassVar = TILE

    def empty(self, out: int, into: int, scheme: Scheme, dtype: torch.dtype, place: Place) -> Tensors:
        check_group(scheme)
        tiles, groups = -(-out // TILE), -(-into // scheme.group)
        tensors = {
            "tiles": place.empty((tiles, groups * scheme.group // 8, TILE, 4), torch.uint8),
            "scales": place.empty((tiles, groups, TILE), scale_dtype(scheme)),
        }
        if not scheme.symmetric:
            tensors["zeros"] = place.empty((tiles, groups, TILE), torch.uint8)
        return tensors

    def fill(self, weight: Weight, start: int, rows: torch.Tensor) -> None:
        part = self._part(weight, start, len(rows))
        weight.kernels.store_int4(rows, weight.scheme.group, part["tiles"], part["scales"], part.get("zeros"))

    def fill_codes(self, weight: Weight, start: int, codes: Codes) -> None:
        part = self._part(weight, start, len(codes.values))
        part["tiles"].copy_(pack_int4(codes.values, weight.scheme.group))
        part["scales"].copy_(by_tile(codes.scales))
        if codes.zeros is not None:
            part["zeros"].copy_(by_tile(codes.zeros))

    def _part(self, weight: Weight, start: int, count: int) -> Tensors:
        first, end = start // TILE, -(-(start + count) // TILE)
        return {name: tensor[first:end] for name, tensor in weight.tensors.items()}

    def dequant(self, weight: Weight) -> torch.Tensor:
        tiles, scales = weight.tensors["tiles"], by_output(weight.tensors["scales"], weight.out)
        codes = unpack_int4(tiles, weight.out, tiles.shape[1] * 8)
        zeros = by_output(weight.tensors["zeros"], weight.out) if "zeros" in weight.tensors else None
        return int4_floats(codes, scales, zeros, weight.into, weight.dtype)

    def matmul(self, weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        kernels, t = weight.kernels, weight.tensors
        linear = kernels.int4_weight_linear if weight.scheme.weight_only else kernels.int4_linear
        return linear(x, t["tiles"], t["scales"], t.get("zeros"), weight.out, weight.scheme.group, bias)

    def rows(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        t = weight.tensors
        sizes = weight.out, weight.into, weight.scheme.group
        return weight.kernels.int4_embedding(ids, t["tiles"], t["scales"], t.get("zeros"), *sizes, weight.dtype)


def check_group(scheme: Scheme) -> None:
    """ConfigError for a group that kernels do not take."""
    if scheme.group not in GROUPS:
        raise ConfigError(f"int4 with group={scheme.group}: the group must be one of {GROUPS}")


def scale_dtype(scheme: Scheme) -> torch.dtype:
    return torch.float32 if scheme.wide_scales else torch.float16
