"""From a matrix's floats to the tiles that kernels read, in one pass: what happens to every weight at load; and rows of
rounded ones as floats again, for embeddings.

Rounding is that of ``ops/rounding.py``. Rows and groups do not see each other, so that a matrix can come in slices of
whole tiles.
"""

from __future__ import annotations

from typing import Any

import torch

from tuili.ops import samples
from tuili.ops.cpu.integer import by_tile, int4_rows, pack_int4, pack_int8
from tuili.ops.cpu.packed import TILE, pack, shape, tile_rows
from tuili.ops.rounding import round_blocks, round_groups
from tuili.ops.table import Sample, op

SIZES = ((16, 64), (41, 100), (96, 256), (33, 37))


def _samples(args: Any, dtypes: tuple[torch.dtype, ...] = samples.DTYPES) -> list[Sample]:
    return [
        sample
        for out, into in SIZES
        for sample in samples.each_dtype(
            f"{out}x{into}",
            lambda g, d, out=out, into=into: args(_matrix(g, d, out, into)),  # type: ignore[misc]
            dtypes,
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


@op(lambda: _samples(_floats_args, (*samples.DTYPES, torch.float16)))
def store_floats(matrix: torch.Tensor, tiles: torch.Tensor) -> None:
    """``matrix`` [out, into] into ``tiles`` of its dtype."""
    pack(matrix, tiles)


def _int8_args(matrix: torch.Tensor) -> tuple[Any, ...]:
    out, into = matrix.shape
    return matrix, torch.zeros(-(-out // TILE), -(-into // 4), TILE, 4, dtype=torch.uint8), torch.zeros(out)


@op(lambda: _samples(_int8_args))
def store_int8(matrix: torch.Tensor, tiles: torch.Tensor, scales: torch.Tensor) -> None:
    """``matrix`` [out, into] rounded by ``round_blocks`` into ``tiles`` and ``scales`` [out]; that of zeros is 1."""
    values, found = round_blocks(matrix, torch.int8, 1, matrix.shape[1])
    tiles.copy_(pack_int8(values))
    scales.copy_(torch.where(found == 0, 1.0, found)[:, 0])


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
    """``matrix`` [out, into] rounded by ``round_groups`` into ``tiles``, ``scales`` and (None: symmetric) ``zeros``."""
    values, found, points = round_groups(matrix, group, zeros is None)
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
