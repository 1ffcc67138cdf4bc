"""4-bit weights, a float16 scale (not symmetric: and a zero point) per group of inputs; int8 activations (W4A8), or
floats (W4A16). Where float16 would change scales, they are float32, and torch's references multiply."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuili.base.errors import ConfigError
from tuili.quant.formats import Stored, Tensors, WeightFormat, formats, up
from tuili.quant.scheme import GROUPS, TILE, Scheme

if TYPE_CHECKING:
    import torch

    from tuili.quant.weight import Codes, Weight


@formats.register("int4")
class Int4(WeightFormat):
    numbers, packings, fast = ("int4",), ("cpu",), ("cpu",)

    def tensors(self, out: int, into: int, scheme: Scheme, dtype: str) -> dict[str, Stored]:
        groups = groups_of(into, scheme)
        tiles = Stored((up(out, TILE), groups * scheme.group // 8, TILE, 4), "uint8", TILE)
        return {"tiles": tiles, **group_numbers((up(out, TILE), groups, TILE), scheme)}

    def pack(self, codes: Codes, scheme: Scheme) -> Tensors:
        from tuili.ops.cpu.integer import by_tile, pack_int4

        packed = {"tiles": pack_int4(codes.values, scheme.group), "scales": by_tile(codes.scales)}
        return packed if codes.zeros is None else packed | {"zeros": by_tile(codes.zeros)}

    def store(self, weight: Weight, start: int, rows: torch.Tensor) -> None:
        """In one pass: the codes are those of ``quant.round``."""
        part = {name: weight.part(name, start, len(rows)) for name in weight.tensors}
        weight.kernels.store_int4(rows, weight.scheme.group, part["tiles"], part["scales"], part.get("zeros"))

    def dequant(self, weight: Weight) -> torch.Tensor:
        from tuili.ops.cpu.integer import by_output, unpack_int4
        from tuili.ops.cpu.store import int4_floats

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


def groups_of(into: int, scheme: Scheme) -> int:
    """Groups of a row. ConfigError for a group that kernels do not take."""
    if scheme.group not in GROUPS:
        raise ConfigError(f"int4 with group={scheme.group}: the group must be one of {GROUPS}")
    return up(into, scheme.group)


def group_numbers(shape: tuple[int, int, int], scheme: Scheme) -> dict[str, Stored]:
    """Scales and, unless symmetric, zero points: a number per group, in tiles of ``shape[2]`` outputs."""
    scales = {"scales": Stored(shape, "float32" if scheme.wide_scales else "float16", shape[2])}
    return scales if scheme.symmetric else scales | {"zeros": Stored(shape, "uint8", shape[2])}
