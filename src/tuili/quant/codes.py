"""``Codes``: what an algorithm rounded a matrix to, before a format packs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Codes:
    """What an algorithm decided: ``values`` [out, in], int8 or float8 for 8 bits and 0..15 in uint8 for 4.

    ``scales`` (float) and ``zeros`` (of the values' dtype) [out / height, groups]: a weight is
    ``(value - zero) * scale``; without zeros, zero is 0 for 8 bits and 8 for 4.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    @staticmethod
    def join(pieces: Sequence[Codes]) -> Codes:
        """``pieces`` on top of each other."""
        zeros = [piece.zeros for piece in pieces if piece.zeros is not None]
        values, scales = (torch.cat([getattr(piece, name) for piece in pieces]) for name in ("values", "scales"))
        return Codes(values, scales, torch.cat(zeros) if zeros else None)

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Codes:
        return Codes(change(self.values), change(self.scales), None if self.zeros is None else change(self.zeros))
