"""From a matrix's floats to the tiles that kernels read, in one pass: what happens to every weight at load; and rows of
rounded ones as floats again, for embeddings.

Rounding is to nearest: the plainest way from floats to codes. Rows and groups do not see each other, so that a matrix
can come in slices of whole tiles.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tuili.ops import samples
from tuili.ops.cpu.integer import by_tile, int4_rows, pack_int4, pack_int8
from tuili.ops.cpu.packed import TILE, pack, shape, tile_rows
from tuili.ops.table import Sample, op

#: What the scales of 4-bit groups may be, as shares of the one that reaches the group's extreme.
CLIPS = (1.0, 0.95, 0.9, 0.85)


def round_int8(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 and scales float32 [out, 1]: the row's largest magnitude becomes 127."""
    wide = matrix.float()
    scales = wide.abs().amax(1, keepdim=True) / 127
    scales[scales == 0] = 1
    return (wide / scales).round().to(torch.int8), scales


def round_int4(
    matrix: torch.Tensor, group: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes 0..15 in uint8, and per ``group`` of a row's inputs a scale, made float16 before the codes are chosen.

    Symmetric: zero is code 8, and the group's extreme is code 0, so that its scale has the other sign. Of that scale
    and some smaller ones, which clip the extreme, the one with the least squared error. Else the group's range, widened
    to hold zero, spans 0 to 15, and there are zero points (uint8).
    """
    out, into = matrix.shape
    wide = F.pad(matrix.float(), (0, -into % group)).view(out, -1, group)
    low, high = wide.amin(-1).clamp(max=0), wide.amax(-1).clamp(min=0)
    if symmetric:
        codes, scales = _least_error(wide, torch.where(high < -low, low, high) / -8)
        return codes.view(out, -1)[:, :into], scales, None
    scales = _half((high - low) / 15)
    divisor = scales.float()
    zeros = (-low / divisor).round().clamp(0, 15)
    codes = ((wide / divisor.unsqueeze(-1)).round() + zeros.unsqueeze(-1)).clamp(0, 15).to(torch.uint8)
    return codes.view(out, -1)[:, :into], scales, zeros.to(torch.uint8)


def _least_error(wide: torch.Tensor, steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric codes and scales of groups ``wide`` [out, groups, group] with ``steps`` [out, groups] or a bit less."""
    least = torch.full_like(steps, torch.inf)
    codes, scales = torch.zeros_like(wide, dtype=torch.uint8), torch.zeros_like(steps, dtype=torch.float16)
    for share in CLIPS:
        tried = _half(steps * share)
        step = tried.float().unsqueeze(-1)
        exact = (wide * (1 / step)).round().clamp(-8, 7)
        error = _ordered_sum((wide - exact * step).square())
        better = error < least
        least, scales = torch.where(better, error, least), torch.where(better, tried, scales)
        codes = torch.where(better.unsqueeze(-1), (exact + 8).to(torch.uint8), codes)
    return codes, scales


def _half(scales: torch.Tensor) -> torch.Tensor:
    half = scales.half()
    return torch.where(half == 0, torch.ones_like(half), half)


def _ordered_sum(x: torch.Tensor) -> torch.Tensor:
    """Sums of [.., group] in the kernels' order: sixteen lanes, then halves upon halves."""
    lanes = x.unflatten(-1, (-1, TILE))
    total = lanes[..., 0, :]
    for step in range(1, lanes.shape[-2]):
        total = total + lanes[..., step, :]
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total.squeeze(-1)


SIZES = ((16, 64), (41, 100), (96, 256), (33, 37))


def _samples(args: Any) -> list[Sample]:
    return [
        sample
        for out, into in SIZES
        for sample in samples.each_dtype(
            f"{out}x{into}",
            lambda g, d, out=out, into=into: args(_matrix(g, d, out, into)),  # type: ignore[misc]
        )
    ]


def _matrix(g: torch.Generator, dtype: torch.dtype, out: int, into: int) -> torch.Tensor:
    """With a row and a group of zeros, and a row that is a part of something wider."""
    matrix = samples.randn(g, out, into + 3, dtype=dtype)[:, :into]
    matrix[3] = 0
    matrix[5, :64] = 0
    return matrix


def _floats_args(matrix: torch.Tensor) -> tuple[Any, ...]:
    return matrix, torch.zeros(shape(*matrix.shape, matrix.dtype), dtype=matrix.dtype)  # type: ignore[call-arg]


@op(lambda: _samples(_floats_args))
def store_floats(matrix: torch.Tensor, tiles: torch.Tensor) -> None:
    """``matrix`` [out, into] into ``tiles`` of its dtype."""
    pack(matrix, tiles)


def _int8_args(matrix: torch.Tensor) -> tuple[Any, ...]:
    out, into = matrix.shape
    return matrix, torch.zeros(-(-out // TILE), -(-into // 4), TILE, 4, dtype=torch.uint8), torch.zeros(out)


@op(lambda: _samples(_int8_args))
def store_int8(matrix: torch.Tensor, tiles: torch.Tensor, scales: torch.Tensor) -> None:
    """``matrix`` [out, into] rounded by ``round_int8`` into ``tiles`` and ``scales`` [out]."""
    values, found = round_int8(matrix)
    tiles.copy_(pack_int8(values))
    scales.copy_(found[:, 0])


def _int4_args(matrix: torch.Tensor) -> tuple[Any, ...]:
    out, into = matrix.shape
    group, tiles = (32, 64, 128)[out % 3], -(-out // TILE)
    groups = -(-into // group)
    scales = torch.zeros(tiles, groups, TILE, dtype=torch.float16)
    zeros = torch.zeros(scales.shape, dtype=torch.uint8) if into % 8 else None
    return matrix, group, torch.zeros(tiles, groups * group // 8, TILE, 4, dtype=torch.uint8), scales, zeros


@op(lambda: _samples(_int4_args))
def store_int4(
    matrix: torch.Tensor, group: int, tiles: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> None:
    """``matrix`` [out, into] rounded by ``round_int4`` into ``tiles``, ``scales`` and (None: symmetric) ``zeros``."""
    values, found, points = round_int4(matrix, group, zeros is None)
    tiles.copy_(pack_int4(values, group))
    scales.copy_(by_tile(found))
    if zeros is not None and points is not None:
        zeros.copy_(by_tile(points))


def int4_floats(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, inputs: int, dtype: torch.dtype
) -> torch.Tensor:
    """``codes`` [n, padded inputs], ``scales`` and ``zeros`` [n, groups] to weights [n, inputs]."""
    grouped = codes.view(len(codes), scales.shape[1], -1).float()
    offset = 8.0 if zeros is None else zeros.float().unsqueeze(-1)
    floats = ((grouped - offset) * scales.float().unsqueeze(-1)).flatten(1).to(dtype)
    return floats[:, :inputs].contiguous()


def _int8_rows_args(matrix: torch.Tensor) -> tuple[Any, ...]:
    args = _int8_args(matrix)
    store_int8.reference(*args)
    return torch.tensor([0, len(matrix) - 1, 5, 5]), *args[1:], matrix.shape[1], matrix.dtype


@op(lambda: _samples(_int8_rows_args))
def int8_embedding(
    ids: torch.Tensor, tiles: torch.Tensor, scales: torch.Tensor, inputs: int, dtype: torch.dtype
) -> torch.Tensor:
    """Rows ``ids`` [n] of an 8-bit matrix: [n, inputs] in ``dtype``."""
    codes = tile_rows(tiles, ids)[:, :inputs].float() - 128
    return (codes * scales[ids].unsqueeze(1)).to(dtype)


def _int4_rows_args(matrix: torch.Tensor) -> tuple[Any, ...]:
    _, group, *tensors = args = _int4_args(matrix)
    store_int4.reference(*args)
    return torch.tensor([0, len(matrix) - 1, 5, 5]), *tensors, *matrix.shape, group, matrix.dtype


@op(lambda: _samples(_int4_rows_args))
def int4_embedding(
    ids: torch.Tensor,
    tiles: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    outputs: int,
    inputs: int,
    group: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows ``ids`` [n], below ``outputs``, of a 4-bit matrix: [n, inputs] in ``dtype``."""
    tile, lane = ids // TILE, ids % TILE
    points = None if zeros is None else zeros[tile, :, lane]
    return int4_floats(int4_rows(tiles, ids), scales[tile, :, lane], points, inputs, dtype)
