"""Integer weights in tile order, and their products with activations, rounded to int8 by row or as they are.

8 bits: tiles ``[tiles, inputs / 4, 16, 4]`` uint8 hold code + 128; ``scales`` [outputs] float32. 4 bits: tiles
``[tiles, inputs / 8, 16, 4]`` uint8 hold inputs 0 to 3 of eight in their low halves and 4 to 7 in their high halves;
``scales`` [tiles, groups, 16] float16 and ``zeros``, alike in uint8 (None: all 8). A weight is
``(code - zero) * scale``. Inputs are padded to whole steps (8 bits) or groups (4 bits).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tuili.ops import samples
from tuili.ops.cpu.packed import TILE, tile_rows
from tuili.ops.reference import linear
from tuili.ops.table import Sample, op


def _pad(codes: torch.Tensor, multiple: int) -> torch.Tensor:
    return F.pad(codes, (0, -codes.shape[1] % multiple, 0, -codes.shape[0] % TILE))


def pack_int8(codes: torch.Tensor) -> torch.Tensor:
    """Codes -127..127 [outputs, inputs] int8 as tiles."""
    shifted = (_pad(codes, 4).to(torch.int16) + 128).to(torch.uint8)
    return shifted.view(-1, TILE, shifted.shape[1] // 4, 4).transpose(1, 2).contiguous()


def unpack_int8(tiles: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    rows = tiles.transpose(1, 2).reshape(-1, tiles.shape[1] * 4)[:outputs, :inputs]
    return (rows.to(torch.int16) - 128).to(torch.int8)


def pack_int4(codes: torch.Tensor, group: int) -> torch.Tensor:
    """Codes 0..15 [outputs, inputs] uint8 as tiles; ``group`` is a multiple of 8."""
    padded = _pad(codes, group)
    eights = padded.view(-1, TILE, padded.shape[1] // 8, 2, 4).transpose(1, 2)
    return (eights[..., 0, :] | eights[..., 1, :] << 4).contiguous()


def unpack_int4(tiles: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    eights = torch.stack((tiles & 15, tiles >> 4), 3).transpose(1, 2)
    return eights.reshape(-1, tiles.shape[1] * 8)[:outputs, :inputs].contiguous()


def int4_rows(tiles: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Codes of rows ``ids`` [n], inputs padded: [n, inputs]."""
    rows = tile_rows(tiles, ids).view(len(ids), -1, 1, 4)
    return torch.cat((rows & 15, rows >> 4), 2).flatten(1)


def by_tile(values: torch.Tensor) -> torch.Tensor:
    """Per-group numbers [outputs, groups] as [tiles, groups, 16]."""
    return (
        F.pad(values, (0, 0, 0, -values.shape[0] % TILE)).view(-1, TILE, values.shape[1]).transpose(1, 2).contiguous()
    )


def by_output(values: torch.Tensor, outputs: int) -> torch.Tensor:
    """``by_tile`` undone."""
    return values.transpose(1, 2).reshape(-1, values.shape[1])[:outputs]


def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [rows, n] as int8 codes (in float32) and factors [rows, 1]: the largest of a row becomes 127."""
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127.0 / largest, torch.zeros(()))
    return (wide * inverse).round(), largest / 127.0


def _finish(sums: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return (sums if bias is None else sums + bias.float()).to(dtype)


def _int8_samples() -> list[Sample]:
    def args(g: torch.Generator, d: torch.dtype, rows: int, into: int, out: int) -> tuple[Any, ...]:
        codes = torch.randint(-127, 128, (out, into), generator=g, dtype=torch.int8)
        bias = samples.randn(g, out, dtype=d) if rows % 2 else None
        return samples.randn(g, rows, into, dtype=d), pack_int8(codes), torch.rand(out, generator=g) / 999, out, bias

    return _shapes(args)


def _shapes(args: Any) -> list[Sample]:
    sizes = ((1, 64, 96), (2, 128, 80), (3, 100, 41), (8, 256, 768), (17, 37, 16), (40, 200, 48), (65, 96, 64))
    return [
        sample
        for rows, into, out in sizes
        for sample in samples.each_dtype(
            f"{rows}x{into}x{out}",
            lambda g, d, rows=rows, into=into, out=out: args(g, d, rows, into, out),  # type: ignore[misc]
        )
    ]


@op(_int8_samples, tolerance=1e-6)
def int8_linear(
    x: torch.Tensor, tiles: torch.Tensor, scales: torch.Tensor, outputs: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``x`` [rows, inputs] rounded to int8 per row, times 8-bit weights: [rows, outputs] in x's dtype.

    Sums over inputs are exact; ``float32(sum) * factor * scale``, plus ``bias``.
    """
    codes, factor = round_rows(x)
    exact = codes.double() @ unpack_int8(tiles, outputs, x.shape[1]).double().T
    return _finish(exact.float() * factor * scales, bias, x.dtype)


def _int4_samples() -> list[Sample]:
    def args(g: torch.Generator, d: torch.dtype, rows: int, into: int, out: int) -> tuple[Any, ...]:
        group = (32, 64, 128)[rows % 3]
        codes = torch.randint(0, 16, (out, into), generator=g, dtype=torch.uint8)
        scales = (torch.rand(out, -(-into // group), generator=g) / 99).half()
        zeros = torch.randint(0, 16, scales.shape, generator=g, dtype=torch.uint8) if rows % 2 else None
        packed = pack_int4(codes, group), by_tile(scales), None if zeros is None else by_tile(zeros)
        bias = samples.randn(g, out, dtype=d) if rows == 3 else None
        return samples.randn(g, rows, into, dtype=d), *packed, out, group, bias

    return _shapes(args)


@op(_int4_samples, tolerance=1e-5)
def int4_linear(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    outputs: int,
    group: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x`` [rows, inputs] rounded to int8 per row, times 4-bit weights in groups: [rows, outputs] in x's dtype.

    Sums within a group are exact; groups are added, each times its scale, and the row's factor goes on last.
    """
    codes, factor = round_rows(x)
    codes = F.pad(codes, (0, -codes.shape[1] % group)).view(len(x), -1, group).double()
    weight = unpack_int4(tiles, outputs, tiles.shape[1] * 8).view(outputs, -1, group).double()
    offset = torch.full((1, 1), 8.0) if zeros is None else by_output(zeros, outputs)
    exact = torch.einsum("rgk,ogk->rog", codes, weight - offset.double().unsqueeze(-1))
    sums = (exact * by_output(scales, outputs).double()).sum(-1).float() * factor
    return _finish(sums, bias, x.dtype)


@op(_int8_samples, tolerance=1e-5)
def int8_weight_linear(
    x: torch.Tensor, tiles: torch.Tensor, scales: torch.Tensor, outputs: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``x`` [rows, inputs] as it is, times 8-bit weights that are dequantized to float32: [rows, outputs] in x's dtype.

    Products and sums are float32. Tiles and scales are those of ``int8_linear``.
    """
    weight = unpack_int8(tiles, outputs, x.shape[1]) * scales.unsqueeze(1)
    return linear.reference(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


@op(_int4_samples, tolerance=1e-5)
def int4_weight_linear(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    outputs: int,
    group: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x`` [rows, inputs] as it is, times 4-bit weights that are dequantized to float32: [rows, outputs] in x's dtype.

    Products and sums are float32. Tiles, scales and zeros are those of ``int4_linear``.
    """
    codes = unpack_int4(tiles, outputs, tiles.shape[1] * 8).view(outputs, -1, group).float()
    offset = torch.full((1, 1), 8.0) if zeros is None else by_output(zeros, outputs).float()
    weight = (codes - offset.unsqueeze(-1)) * by_output(scales, outputs).float().unsqueeze(-1)
    wide = weight.flatten(1)[:, : x.shape[1]]
    return linear.reference(x.float(), wide, None if bias is None else bias.float()).to(x.dtype)
