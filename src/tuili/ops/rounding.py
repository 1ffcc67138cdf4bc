"""Floats to codes with scales, to nearest: what the kernels that round weights mean, operation by operation."""

from __future__ import annotations

import torch
import torch.nn.functional as F

FP8 = torch.float8_e4m3fn
#: Largest magnitude of a code.
LARGEST = {torch.int8: 127.0, FP8: 448.0}
#: What the scales of 4-bit groups may be, as shares of the one that reaches the group's extreme.
CLIPS = (1.0, 0.95, 0.9, 0.85)
#: Lanes in which kernels add.
LANES = 16


def round_blocks(
    matrix: torch.Tensor, dtype: torch.dtype, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``matrix`` as codes of ``dtype`` (int8 or float8) and float32 scales: of ``height`` x ``width`` numbers the
    largest becomes the largest code. The scale of zeros is 0."""
    rows, inputs = matrix.shape
    padded = F.pad(matrix.float(), (0, -inputs % width, 0, -rows % height))
    blocks = padded.view(-(-rows // height), height, -(-inputs // width), width)
    scales = blocks.abs().amax((1, 3)) / LARGEST[dtype]
    exact = blocks / torch.where(scales == 0, 1.0, scales)[:, None, :, None]
    codes = exact.round().to(torch.int8) if dtype == torch.int8 else exact.to(dtype)
    return codes.view(padded.shape)[:rows, :inputs], scales


def round_groups(
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
    lanes = x.unflatten(-1, (-1, LANES))
    total = lanes[..., 0, :]
    for step in range(1, lanes.shape[-2]):
        total = total + lanes[..., step, :]
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total.squeeze(-1)
