"""4-bit weights, a float16 scale (not symmetric: and a zero point) per group of inputs, int8 activations (W4A8)."""

from __future__ import annotations

import torch

from tuili.base.errors import ConfigError
from tuili.ops.cpu import Arena, int4_linear
from tuili.ops.cpu.integer import by_output, by_tile, int4_rows, pack_int4, unpack_int4
from tuili.ops.cpu.packed import TILE
from tuili.quant.rounding import round_int4
from tuili.quant.scheme import Scheme
from tuili.quant.weight import Codes, Tensors, formats

GROUPS = (32, 64, 128)


@formats.register("int4")
class Int4:
    def empty(self, out: int, into: int, scheme: Scheme, dtype: torch.dtype, arena: Arena) -> Tensors:
        if scheme.group not in GROUPS:
            raise ConfigError(f"int4 with group={scheme.group}: the group must be one of {GROUPS}")
        tiles, groups = -(-out // TILE), -(-into // scheme.group)
        tensors = {
            "tiles": arena.empty((tiles, groups * scheme.group // 8, TILE, 4), torch.uint8),
            "scales": arena.empty((tiles, groups, TILE), torch.float16),
            "like": torch.empty(0, dtype=dtype),
        }
        if not scheme.symmetric:
            tensors["zeros"] = arena.empty((tiles, groups, TILE), torch.uint8)
        return tensors

    def pack(self, codes: Codes, scheme: Scheme, tensors: Tensors) -> None:
        if codes.scales is None:
            codes = round_int4(codes.values, scheme.group, scheme.symmetric)
        assert codes.scales is not None
        tensors["tiles"].copy_(pack_int4(codes.values, scheme.group))
        tensors["scales"].copy_(by_tile(codes.scales))
        if codes.zeros is not None:
            tensors["zeros"].copy_(by_tile(codes.zeros))

    def dequant(self, tensors: Tensors, scheme: Scheme, out: int, into: int) -> torch.Tensor:
        codes = unpack_int4(tensors["tiles"], out, tensors["tiles"].shape[1] * 8)
        zeros = by_output(tensors["zeros"], out) if "zeros" in tensors else None
        return self._floats(codes, by_output(tensors["scales"], out), zeros, tensors)[:, :into].contiguous()

    def matmul(
        self, x: torch.Tensor, tensors: Tensors, scheme: Scheme, out: int, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return int4_linear(x, tensors["tiles"], tensors["scales"], tensors.get("zeros"), out, scheme.group, bias)

    def rows(self, ids: torch.Tensor, tensors: Tensors, scheme: Scheme, into: int) -> torch.Tensor:
        tile, lane = ids // TILE, ids % TILE
        zeros = tensors["zeros"][tile, :, lane] if "zeros" in tensors else None
        codes = int4_rows(tensors["tiles"], ids)
        return self._floats(codes, tensors["scales"][tile, :, lane], zeros, tensors)[:, :into].contiguous()

    def _floats(
        self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, tensors: Tensors
    ) -> torch.Tensor:
        """``codes`` [n, inputs], ``scales`` and ``zeros`` [n, groups] to weights."""
        grouped = codes.view(len(codes), scales.shape[1], -1).float()
        offset = 8.0 if zeros is None else zeros.float().unsqueeze(-1)
        return ((grouped - offset) * scales.float().unsqueeze(-1)).flatten(1).to(tensors["like"].dtype)
