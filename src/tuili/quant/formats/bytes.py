"""8 bits as files hold them, [out, in], int8 or float8 E4M3: float32 scales (int8 may have zeros too) for an output, a
group of its inputs, or a block; times activations that are rounded alike per row (W8A8), or not (W8A16).

For Triton's kernels; on a CPU torch's references multiply, exact and slow.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from tuili.base.errors import ConfigError
from tuili.ops.triton.layouts import (
    FP8,
    byte_floats,
    round_blocks,
)
from tuili.quant.place import Place
from tuili.quant.scheme import BLOCK, GROUPS, TILE, Scheme
from tuili.quant.weight import Codes, Tensors, Weight, formats


@formats.register("bytes")
class Bytes:
    tile: ClassVar = TILE

    def empty(self, out: int, into: int, scheme: Scheme, dtype: torch.dtype, place: Place) -> Tensors:
        _check(scheme)
        groups = -(-into // scheme.group) if scheme.group else 1
        shape = (-(-out // scheme.height), groups)
        tensors = {"codes": place.empty((out, into), _dtype(scheme)), "scales": place.empty(shape, torch.float32)}
        return tensors if scheme.symmetric else tensors | {"zeros": place.empty(shape, torch.int8)}

    def fill(self, weight: Weight, start: int, rows: torch.Tensor) -> None:
        scheme = weight.scheme
        assert scheme.symmetric, "rounding to nearest is symmetric"
        codes = round_blocks(rows, _dtype(scheme), scheme.height, scheme.group or weight.into)
        self.fill_codes(weight, start, Codes(*codes))

    def fill_codes(self, weight: Weight, start: int, codes: Codes) -> None:
        end, height, t = start + len(codes.values), weight.scheme.height, weight.tensors
        lines = slice(start // height, -(-end // height))
        t["codes"][start:end] = codes.values
        t["scales"][lines] = codes.scales.float()
        if codes.zeros is not None:
            t["zeros"][lines] = codes.zeros

    def dequant(self, weight: Weight) -> torch.Tensor:
        t = weight.tensors
        return byte_floats(t["codes"], t["scales"], t.get("zeros")).to(weight.dtype)

    def matmul(self, weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        t = weight.tensors
        if weight.scheme.weight_only:
            return weight.kernels.byte_weight_only_linear(x, t["codes"], t["scales"], bias, t.get("zeros"))
        return weight.kernels.byte_linear(x, t["codes"], t["scales"], bias)

    def rows(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        t = weight.tensors
        return weight.kernels.byte_embedding(ids, t["codes"], t["scales"], t.get("zeros"), weight.dtype)


def _dtype(scheme: Scheme) -> torch.dtype:
    return FP8 if scheme.format == "fp8" else torch.int8


def _check(scheme: Scheme) -> None:
    """ConfigError for what kernels do not take."""
    if scheme.group not in (0, *GROUPS):
        raise ConfigError(f"{scheme.format} with group={scheme.group}: the group must be one of {GROUPS}, or 0")
    if scheme.height not in (1, BLOCK) or (scheme.height == BLOCK and scheme.group != BLOCK):
        raise ConfigError(f"{scheme.format} in blocks of {scheme.height} x {scheme.group}: only {BLOCK} x {BLOCK} is")
    if not scheme.symmetric and (scheme.format == "fp8" or not scheme.weight_only):
        raise ConfigError(f"{scheme}: zero points go with int8 weights and activations that are not rounded")
