"""``Weight``: a matrix in a format, as layers hold it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from tuili.ops import REFERENCE, Kernels
from tuili.quant.formats import Tensors, WeightFormat, format_of, up
from tuili.quant.place import Place
from tuili.quant.scheme import Scheme

#: Elements that are stored at once: what is made on the way stays small, and in the cache.
SLICE = 1 << 20


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


def slices(rows: int, width: int, multiple: int = 1) -> list[tuple[int, int]]:
    """``rows`` of ``width`` elements in pieces [start, end) of about SLICE elements, and a ``multiple`` of rows."""
    step = max(1, SLICE // max(1, width) // multiple) * multiple
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


@dataclass(frozen=True)
class Weight:
    """An [out, into] matrix stored by ``scheme``, for activations of ``dtype``; ``kernels`` multiply it."""

    scheme: Scheme
    format: WeightFormat
    tensors: Tensors
    out: int
    into: int
    dtype: torch.dtype
    kernels: Kernels = REFERENCE

    @staticmethod
    def empty(out: int, into: int, scheme: Scheme, dtype: torch.dtype, place: Place) -> Weight:
        """Room for a matrix; ``fill`` brings it. ConfigError for an unknown format or one that the scheme misfits."""
        format = format_of(scheme, place.packing)
        stored = format.tensors(out, into, scheme, str(dtype).removeprefix("torch."))
        tensors = {name: place.empty(tensor.shape, getattr(torch, tensor.dtype)) for name, tensor in stored.items()}
        return Weight(scheme, format, tensors, out, into, dtype, place.kernels)

    @staticmethod
    def of(matrix: torch.Tensor, scheme: Scheme, place: Place) -> Weight:
        """``matrix`` [out, into] stored by ``scheme``, for activations of its dtype."""
        out, into = matrix.shape
        weight = Weight.empty(out, into, scheme, matrix.dtype, place)
        for start, end in weight.slices():
            weight.fill(start, place.bring(matrix[start:end]))
        return weight

    @property
    def step(self) -> int:
        """Where the rows may be cut: they come in multiples of it."""
        return max(self.format.tile, self.scheme.height)

    def slices(self) -> list[tuple[int, int]]:
        """The rows in pieces [start, end) that are stored at once."""
        return slices(self.out, self.into, self.step)

    def fill(self, start: int, rows: torch.Tensor | Codes) -> None:
        """Store rows from ``start`` on: floats, or what they were rounded to."""
        count = len(rows.values if isinstance(rows, Codes) else rows)
        assert start % self.step == 0
        assert count % self.step == 0 or start + count == self.out
        if isinstance(rows, torch.Tensor):
            self.format.store(self, start, rows)
            return
        for name, packed in self.format.pack(rows, self.scheme).items():
            self.part(name, start, count).copy_(packed)

    def part(self, name: str, start: int, count: int) -> torch.Tensor:
        """Of a tensor the entries of ``count`` rows from ``start`` on."""
        lines = self._lines[name]
        return self.tensors[name][start // lines : up(start + count, lines)]

    @cached_property
    def _lines(self) -> dict[str, int]:
        """How many rows share an entry of each tensor."""
        dtype = str(self.dtype).removeprefix("torch.")
        stored = self.format.tensors(self.out, self.into, self.scheme, dtype)
        return {name: tensor.lines for name, tensor in stored.items()}

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.format.matmul(self, x, bias)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self.format.rows(self, ids)

    def dequant(self) -> torch.Tensor:
        return self.format.dequant(self)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())
