"""``Weight``: a matrix in a format, as layers hold it; and what a format must know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from tuili.base.registry import Registry
from tuili.ops.cpu import Arena
from tuili.quant.scheme import TILE, Scheme

Tensors = dict[str, torch.Tensor]
#: Elements that are stored at once: what is made on the way stays small, and in the cache.
SLICE = 1 << 20


@dataclass(frozen=True)
class Codes:
    """What an algorithm decided: ``values`` [out, in], int8 for 8 bits and 0..15 in uint8 for 4.

    ``scales`` and ``zeros`` [out, groups]: a weight is ``(value - zero) * scale``; without zeros, zero is 0 for 8 bits
    and 8 for 4.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None


class WeightFormat(Protocol):
    """One packing. It has no state: what it stores are the ``tensors`` of a ``Weight``."""

    def empty(self, out: int, into: int, scheme: Scheme, dtype: torch.dtype, arena: Arena) -> Tensors:
        """Room for an [out, into] matrix of a model whose activations are ``dtype``."""

    def fill(self, weight: Weight, start: int, rows: torch.Tensor) -> None:
        """Store ``rows`` [n, into] (floats) from row ``start`` on, rounded to nearest where the scheme rounds.

        ``start`` is a multiple of TILE, and n too unless it ends the matrix.
        """

    def dequant(self, weight: Weight) -> torch.Tensor:
        """The meaning: the matrix [out, into] in the activations' dtype."""

    def matmul(self, weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The speed: ``x`` [rows, into] to [rows, out]."""

    def rows(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        """Rows ``ids`` [n] of the matrix (an embedding's): [n, into]."""


formats: Registry[type[WeightFormat]] = Registry("weight format", "tuili.quant.formats")


@dataclass(frozen=True)
class Weight:
    """An [out, into] matrix stored by ``scheme``, for activations of ``dtype``."""

    scheme: Scheme
    format: WeightFormat
    tensors: Tensors
    out: int
    into: int
    dtype: torch.dtype

    @staticmethod
    def empty(out: int, into: int, scheme: Scheme, dtype: torch.dtype, arena: Arena) -> Weight:
        """Room for a matrix; ``fill`` brings it. ConfigError for an unknown format or one that the scheme misfits."""
        format = formats.get(scheme.format)()
        return Weight(scheme, format, format.empty(out, into, scheme, dtype, arena), out, into, dtype)

    @staticmethod
    def of(matrix: torch.Tensor, scheme: Scheme, arena: Arena) -> Weight:
        """``matrix`` [out, into] stored by ``scheme``, for activations of its dtype."""
        out, into = matrix.shape
        weight = Weight.empty(out, into, scheme, matrix.dtype, arena)
        for start, end in weight.slices():
            weight.fill(start, matrix[start:end])
        return weight

    def slices(self) -> list[tuple[int, int]]:
        """The rows in pieces [start, end) that are stored at once."""
        step = max(1, SLICE // max(1, self.into) // TILE) * TILE
        return [(start, min(start + step, self.out)) for start in range(0, self.out, step)]

    def fill(self, start: int, rows: torch.Tensor) -> None:
        assert start % TILE == 0
        assert len(rows) % TILE == 0 or start + len(rows) == self.out
        self.format.fill(self, start, rows)

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.format.matmul(self, x, bias)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self.format.rows(self, ids)

    def dequant(self) -> torch.Tensor:
        return self.format.dequant(self)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())
