"""Quantized weights as the Triton kernels read them, and the ops on them. Torch only: the references run everywhere.

Bytes: int8 or float8 E4M3 codes [outputs, inputs], as files store them; ``scales`` float32, one for all [1, 1], one per
output [outputs, 1], one per output and group of 32, 64 or 128 inputs [outputs, groups], or one per block of 128 x 128.
int8 may have ``zeros`` (int8, one per scale): a weight is ``(code - zero) * scale``.

4 bits: tiles uint8 [tiles, groups, 64, group / 2], so that what a program reads in a step is one piece of memory.
A byte holds input i of its group in its low half and input i + group / 2 in its high half: either half of a tile is an
operand as it is, nothing is interleaved. ``scales`` float16 [tiles, groups, 64], ``zeros`` likewise in uint8 (None: all
8). A weight is ``(code - zero) * scale``. Outputs are padded to whole tiles, inputs to whole groups.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from tuili.ops import samples
from tuili.ops.reference import linear
from tuili.ops.rounding import FP8, round_blocks
from tuili.ops.table import Sample, op

#: Outputs of a tile of 4-bit weights.
TILE = 64
#: Side of a block that shares a scale.
BLOCK = 128
#: Inputs that may share a scale of an output.
WIDTHS = (128, 64, 32)


def pack_int4(codes: torch.Tensor, group: int) -> torch.Tensor:
    """Codes 0..15 [outputs, inputs] uint8 as tiles."""
    padded = F.pad(codes, (0, -codes.shape[1] % group, 0, -codes.shape[0] % TILE))
    halves = padded.view(-1, TILE, padded.shape[1] // group, 2, group // 2).transpose(1, 2)
    return (halves[..., 0, :] | halves[..., 1, :] << 4).contiguous()


def unpack_int4(tiles: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """``pack_int4`` undone."""
    halves = torch.stack((tiles & 15, tiles >> 4), 3).transpose(1, 2)
    return halves.reshape(len(tiles) * TILE, -1)[:outputs, :inputs].contiguous()


def by_tile(values: torch.Tensor) -> torch.Tensor:
    """Per-group numbers [outputs, groups] as [tiles, groups, 64]."""
    padded = F.pad(values, (0, 0, 0, -values.shape[0] % TILE))
    return padded.view(-1, TILE, values.shape[1]).transpose(1, 2).contiguous()


def by_output(values: torch.Tensor, outputs: int) -> torch.Tensor:
    """``by_tile`` undone."""
    return values.transpose(1, 2).reshape(-1, values.shape[1])[:outputs]


def block_of(scales: torch.Tensor, outputs: int, inputs: int) -> tuple[int, int]:
    """The outputs and inputs that share one of ``scales``: read off their number, which leaves no choice.

    As many lines as outputs: lines of groups (ceil(inputs / 64) equals ceil(inputs / 32) for one group only).
    """
    lines, columns = scales.shape
    if columns == 1 and lines in (1, outputs):
        return outputs // lines, inputs
    if lines == outputs:
        return 1, next(width for width in WIDTHS if -(-inputs // width) == columns)
    return BLOCK, BLOCK


def spread(scales: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """``scales`` (or zeros) of bytes as one number per weight (or something that broadcasts to it)."""
    height, width = block_of(scales, outputs, inputs)
    lines = scales if height in (1, outputs) else scales.repeat_interleave(height, 0)[:outputs]
    return lines if width == inputs else lines.repeat_interleave(width, 1)[:, :inputs]


def round_rows(x: torch.Tensor, dtype: torch.dtype, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [rows, n] as codes of ``dtype`` and factors [rows, n / block]: of ``block`` numbers the largest fits."""
    return round_blocks(x, dtype, 1, block)


# Ops ------------------------------------------------------------------------------------------------------------------


def _sizes(make: Any) -> list[Sample]:
    sizes = ((1, 128, 96), (2, 200, 65), (3, 160, 41), (5, 192, 70), (17, 256, 130), (70, 64, 64))
    return [
        sample
        for rows, into, out in sizes
        for sample in samples.each_dtype(f"{rows}x{into}x{out}", partial(make, rows=rows, into=into, out=out))
    ]


def _int4(g: torch.Generator, d: torch.dtype, rows: int, into: int, out: int) -> tuple[Any, ...]:
    group = (128, 32, 64)[rows % 3]
    codes = torch.randint(0, 16, (out, into), generator=g, dtype=torch.uint8)
    scales = (torch.rand(out, -(-into // group), generator=g) / 99).half()
    zeros = torch.randint(0, 16, scales.shape, generator=g, dtype=torch.uint8) if rows % 2 else None
    packed = pack_int4(codes, group), by_tile(scales), None if zeros is None else by_tile(zeros)
    return samples.randn(g, rows, into, dtype=d), *packed, out, samples.randn(g, out, dtype=d) if rows == 3 else None


def _bytes(g: torch.Generator, d: torch.dtype, rows: int, into: int, out: int) -> tuple[Any, ...]:
    """int8 with a scale per output and per group; float8 with one per block, per output, and for all."""
    codes = samples.randn(g, out, into).mul(40).clamp(-127, 127)
    lines, columns = {1: (1, 0), 2: (1, 32), 3: (1, 0), 5: (1, 64), 17: (BLOCK, BLOCK), 70: (0, 0)}[rows]
    shape = (-(-out // lines) if lines else 1, -(-into // columns) if columns else 1)
    scales = (torch.rand(shape, generator=g) + 0.1) / 999
    bias = samples.randn(g, out, dtype=d) if rows == 3 else None
    return samples.randn(g, rows, into, dtype=d), codes.to(torch.int8 if rows in (1, 2) else FP8), scales, bias


def _shifted(g: torch.Generator, d: torch.dtype, rows: int, into: int, out: int) -> tuple[Any, ...]:
    """As ``_bytes``; where they are int8, with zeros."""
    args = _bytes(g, d, rows, into, out)
    zeros = torch.randint(-128, 128, args[2].shape, generator=g, dtype=torch.int8)
    return (*args, zeros) if args[1].dtype == torch.int8 else args


def _rounded(g: torch.Generator, d: torch.dtype, rows: int, into: int, out: int) -> tuple[Any, ...]:
    x, codes, scales, bias = _bytes(g, d, rows, into, out)
    return x, codes.float().round().to(torch.int8) if rows == 3 else codes, scales, bias


@op(lambda: _sizes(_int4), tolerance=1e-5)
def int4_weight_only_linear(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    outputs: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x`` [rows, inputs] times 4-bit weights in groups, nothing rounded: [rows, outputs] in x's dtype."""
    return _product(x.float(), int4_floats(tiles, scales, zeros, outputs, x.shape[1]), bias, x.dtype)


@op(lambda: _sizes(_shifted), tolerance=1e-5)
def byte_weight_only_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x`` [rows, inputs] times weights of 8 bits, nothing rounded: [rows, outputs] in x's dtype."""
    return _product(x.float(), byte_floats(codes, scales, zeros), bias, x.dtype)


@op(lambda: _sizes(_rounded), tolerance=1e-5)
def byte_linear(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As ``byte_weight_only_linear``, ``x`` rounded to the weight's dtype too: per row, or per row and group of inputs
    where the weight has scales per group or block. Sums of products of codes are exact; groups are added in order."""
    outputs, inputs = codes.shape
    height, width = block_of(scales, outputs, inputs)
    lines = scales.repeat_interleave(height, 0)[:outputs]
    rounded, factors = round_rows(x, codes.dtype, width)
    sums = torch.zeros((), device=x.device)
    for group, at in enumerate(range(0, inputs, width)):
        left, right = rounded[:, at : at + width].double(), codes[:, at : at + width].double()
        sums = sums + (left @ right.T).float() * factors[:, group : group + 1] * lines[:, group]
    return (sums if bias is None else sums + bias.float()).to(x.dtype)


def byte_floats(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None) -> torch.Tensor:
    """What bytes mean, in float32: [outputs, inputs]."""
    wide = codes.float() if zeros is None else codes.float() - spread(zeros, *codes.shape).float()
    return wide * spread(scales, *codes.shape)


def int4_floats(
    tiles: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, outputs: int, inputs: int
) -> torch.Tensor:
    """What 4-bit tiles mean, in float32: [outputs, inputs]."""
    groups, group = tiles.shape[1], tiles.shape[3] * 2
    codes = unpack_int4(tiles, outputs, groups * group).view(outputs, groups, group).float()
    offset = 8.0 if zeros is None else by_output(zeros, outputs).float().unsqueeze(-1)
    return ((codes - offset) * by_output(scales, outputs).float().unsqueeze(-1)).flatten(1)[:, :inputs]


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return linear.reference(x, weight, None if bias is None else bias.to(x.dtype)).to(dtype)


def _int4_table(g: torch.Generator, d: torch.dtype, rows: int, into: int, out: int) -> tuple[Any, ...]:
    _, *tensors, _, _ = _int4(g, d, rows, into, out)
    return *tensors, into


def _byte_table(g: torch.Generator, d: torch.dtype, rows: int, into: int, out: int) -> tuple[Any, ...]:
    _, codes, scales, _, *zeros = _shifted(g, d, rows, into, out)
    return codes, scales, zeros[0] if zeros else None


def _rows_of(make: Any) -> list[Sample]:
    ids = torch.tensor([0, 40, 7, 7])

    def args(g: torch.Generator, d: torch.dtype, rows: int, into: int, out: int) -> tuple[Any, ...]:
        return ids, *make(g, d, rows, into, out), d

    return _sizes(args)


@op(lambda: _rows_of(_int4_table))
def int4_tile_embedding(
    ids: torch.Tensor,
    tiles: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    inputs: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows ``ids`` [n] of a 4-bit matrix: [n, inputs] in ``dtype``."""
    tile, line = ids // TILE, ids % TILE
    pairs = tiles[tile, :, line]
    codes = torch.cat((pairs & 15, pairs >> 4), 2).float()
    offset = 8.0 if zeros is None else zeros[tile, :, line].float().unsqueeze(-1)
    floats = (codes - offset) * scales[tile, :, line].float().unsqueeze(-1)
    return floats.flatten(1)[:, :inputs].to(dtype).contiguous()


@op(lambda: _rows_of(_byte_table))
def byte_embedding(
    ids: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Rows ``ids`` [n] of a matrix of bytes: [n, inputs] in ``dtype``."""
    outputs, inputs = codes.shape
    height, width = block_of(scales, outputs, inputs)
    rows = codes.view(torch.uint8)[ids].view(codes.dtype).float()  # float8 cannot be indexed everywhere

    def each(values: torch.Tensor) -> torch.Tensor:
        lines = values[ids // height]
        return lines if width == inputs else lines.repeat_interleave(width, 1)[:, :inputs]

    return ((rows if zeros is None else rows - each(zeros).float()) * each(scales)).to(dtype)
