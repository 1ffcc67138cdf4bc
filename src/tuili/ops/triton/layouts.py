"""Quantized weights as the Triton kernels read them, and the ops on them. Torch only: the references run everywhere.

Bytes: int8 or float8 E4M3 codes [outputs, inputs], as files store them; ``scales`` float32, one for all [1, 1], one per
output [outputs, 1], or one per block of 128 x 128.

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
from tuili.ops.table import Sample, op

#: Outputs of a tile of 4-bit weights.
TILE = 64
#: Side of a block that shares a scale.
BLOCK = 128
FP8 = torch.float8_e4m3fn
#: Largest magnitude of a code.
LARGEST = {torch.int8: 127.0, FP8: 448.0}


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


def spread(scales: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """``scales`` of bytes as one number per weight (or something that broadcasts to it)."""
    if 1 in scales.shape and scales.shape[1] == 1:
        return scales
    return scales.repeat_interleave(BLOCK, 0)[:outputs].repeat_interleave(BLOCK, 1)[:, :inputs]


def blocked(scales: torch.Tensor, outputs: int) -> bool:
    """Whether there is a scale per block (a small matrix may be one block: that is a scale for all)."""
    return scales.shape != (1, 1) and scales.shape != (outputs, 1)


def round_rows(x: torch.Tensor, dtype: torch.dtype, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [rows, n] as codes of ``dtype`` and factors [rows, n / block]: of ``block`` numbers the largest fits."""
    parts = F.pad(x.float(), (0, -x.shape[1] % block)).unflatten(1, (-1, block))
    factors = parts.abs().amax(-1) / LARGEST[dtype]
    exact = parts / factors.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    codes = exact.round().to(torch.int8) if dtype == torch.int8 else exact.to(dtype)
    return codes.flatten(1)[:, : x.shape[1]], factors


# Ops ------------------------------------------------------------------------------------------------------------------


def _sizes(make: Any) -> list[Sample]:
    sizes = ((1, 128, 96), (3, 160, 41), (17, 256, 130), (70, 64, 64))
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
    """int8 with a scale per output; float8 with one scale per block, per output, and for all."""
    codes = samples.randn(g, out, into).mul(40).clamp(-127, 127)
    shape = {1: (out, 1), 3: (out, 1), 17: (-(-out // BLOCK), -(-into // BLOCK)), 70: (1, 1)}[rows]
    scales = (torch.rand(shape, generator=g) + 0.1) / 999
    bias = samples.randn(g, out, dtype=d) if rows == 3 else None
    return samples.randn(g, rows, into, dtype=d), codes.to(torch.int8 if rows == 1 else FP8), scales, bias


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
    groups, group = tiles.shape[1], tiles.shape[3] * 2
    codes = unpack_int4(tiles, outputs, groups * group).view(outputs, groups, group).float()
    offset = 8.0 if zeros is None else by_output(zeros, outputs).float().unsqueeze(-1)
    weight = ((codes - offset) * by_output(scales, outputs).float().unsqueeze(-1)).flatten(1)
    return _product(x.float(), weight[:, : x.shape[1]], bias, x.dtype)


@op(lambda: _sizes(_bytes), tolerance=1e-5)
def byte_weight_only_linear(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``x`` [rows, inputs] times weights of 8 bits, nothing rounded: [rows, outputs] in x's dtype."""
    return _product(x.float(), codes.float() * spread(scales, *codes.shape), bias, x.dtype)


@op(lambda: _sizes(_rounded), tolerance=1e-5)
def byte_linear(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As ``byte_weight_only_linear``, ``x`` rounded to the weight's dtype too: per row, or per row and 128 inputs where
    the weight has a scale per block. Products of codes are exact."""
    outputs, inputs = codes.shape
    block = BLOCK if blocked(scales, outputs) else inputs
    rounded, factors = round_rows(x, codes.dtype, block)
    wide = rounded.double() * factors.double().repeat_interleave(block, 1)[:, :inputs]
    return _product(wide, codes.double() * spread(scales, outputs, inputs).double(), bias, x.dtype)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    sums = F.linear(x, weight)
    return (sums if bias is None else sums + bias.to(sums.dtype)).to(dtype)
