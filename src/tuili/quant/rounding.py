"""Rounding to nearest: the plainest way from floats to codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tuili.quant.weight import Codes


def round_int8(matrix: torch.Tensor) -> Codes:
    """One scale per row: the row's largest magnitude becomes 127. ``values`` int8, ``scales`` float32 [out, 1]."""
    wide = matrix.float()
    scales = wide.abs().amax(1, keepdim=True) / 127
    scales[scales == 0] = 1
    return Codes((wide / scales).round().to(torch.int8), scales)


def round_int4(matrix: torch.Tensor, group: int, symmetric: bool) -> Codes:
    """One scale per ``group`` of a row's inputs, rounded to float16 before the codes are chosen. ``values`` 0..15.

    Symmetric: zero is code 8, and -8 to 7 span the group. Else the group's range, widened to hold zero, spans 0 to 15.
    """
    out, into = matrix.shape
    wide = F.pad(matrix.float(), (0, -into % group)).view(out, -1, group)
    low, high = wide.amin(-1).clamp(max=0), wide.amax(-1).clamp(min=0)
    scales = (torch.maximum(high / 7, -low / 8) if symmetric else (high - low) / 15).half()
    scales[scales == 0] = 1
    divisor = scales.float()
    zeros = None if symmetric else (-low / divisor).round().clamp(0, 15)
    offset = 8.0 if zeros is None else zeros.unsqueeze(-1)
    codes = ((wide / divisor.unsqueeze(-1)).round() + offset).clamp(0, 15).to(torch.uint8)
    return Codes(codes.view(out, -1)[:, :into], scales, None if zeros is None else zeros.to(torch.uint8))
