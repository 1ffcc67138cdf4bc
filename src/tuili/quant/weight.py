"""``Weight``: a matrix in a format, as layers hold it; and what a format must know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from tuili.base.registry import Registry
from tuili.ops.cpu import Arena
from tuili.quant.scheme import Scheme

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Codes:
    """What an algorithm decided: ``values`` [out, in] (floats of a dense weight, else int8 codes).

    ``scales`` and ``zeros`` [out, groups]: a weight is ``(value - zero) * scale``.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None


class WeightFormat(Protocol):
    """One packing. ``tensors`` are what it stores; the float dtype of a model's activations is ``dtype``."""

    def empty(self, out: int, into: int, scheme: Scheme, dtype: torch.dtype, arena: Arena) -> Tensors:
        """Room for an [out, into] matrix."""

    def pack(self, codes: Codes, scheme: Scheme, tensors: Tensors) -> None:
        """Fill ``tensors``."""

    def dequant(self, tensors: Tensors, scheme: Scheme, out: int, into: int) -> torch.Tensor:
        """The meaning: the matrix [out, into] in the activations' dtype."""

    def matmul(
        self, x: torch.Tensor, tensors: Tensors, scheme: Scheme, out: int, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The speed: ``x`` [rows, into] to [rows, out]."""

    def rows(self, ids: torch.Tensor, tensors: Tensors, scheme: Scheme, into: int) -> torch.Tensor:
        """Rows ``ids`` [n] of the matrix (an embedding's): [n, into]."""


formats: Registry[type[WeightFormat]] = Registry("weight format", "tuili.quant.formats")


@dataclass(frozen=True)
class Weight:
    """An [out, into] matrix stored by ``scheme``."""

    scheme: Scheme
    format: WeightFormat
    tensors: Tensors
    out: int
    into: int

    @staticmethod
    def of(matrix: torch.Tensor, scheme: Scheme, arena: Arena) -> Weight:
        """``matrix`` [out, into] stored by ``scheme``: rounded to nearest where the scheme rounds."""
        format = formats.get(scheme.format)()
        out, into = matrix.shape
        tensors = format.empty(out, into, scheme, matrix.dtype, arena)
        format.pack(Codes(matrix), scheme, tensors)
        return Weight(scheme, format, tensors, out, into)

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.format.matmul(x, self.tensors, self.scheme, self.out, bias)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self.format.rows(ids, self.tensors, self.scheme, self.into)

    def dequant(self) -> torch.Tensor:
        return self.format.dequant(self.tensors, self.scheme, self.out, self.into)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())
