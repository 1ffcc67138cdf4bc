"""How a matrix is stored and multiplied: one packing a file, ``@formats.register("name")`` on a ``WeightFormat``.

What planners ask of a format (``takes``, ``tensors``, ``bytes``) needs no torch, so these modules import none: what
computes is asked of a weight's kernels, and what torch has to do is imported where it is done.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from tuili.base.errors import ConfigError, nearest
from tuili.base.registry import Registry
from tuili.quant.scheme import TILE, Scheme

if TYPE_CHECKING:
    import torch

    from tuili.quant.weight import Codes, Weight

Tensors = dict[str, "torch.Tensor"]

#: Bytes of a number, by what torch calls its type.
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1, "float8_e4m3fn": 1}


class Stored(NamedTuple):
    """A tensor of a matrix: its ``shape``, its dtype as torch calls it, and how many outputs an entry of its first
    dimension is for."""

    shape: tuple[int, ...]
    dtype: str
    lines: int = 1


class WeightFormat:
    """One packing. It has no state: what it stores are the ``tensors`` of a ``Weight``."""

    #: What ``Scheme.format`` may be here, and in whose order the weights lie: "cpu" (the C++ kernels) or "triton".
    numbers: ClassVar[tuple[str, ...]]
    packings: ClassVar[tuple[str, ...]]
    #: Packings whose kernels multiply it. In others torch's references do, exact and slow.
    fast: ClassVar[tuple[str, ...]]
    #: Rows that are stored together.
    tile: ClassVar[int] = TILE

    def takes(self, scheme: Scheme, packing: str) -> bool:
        """Whether matrices of ``scheme`` are stored so for kernels of that ``packing``."""
        return scheme.format in self.numbers and packing in self.packings

    def tensors(self, out: int, into: int, scheme: Scheme, dtype: str) -> dict[str, Stored]:
        """The tensors of an [out, into] matrix of a model whose activations are ``dtype``. ConfigError for a scheme
        that kernels do not take."""
        raise NotImplementedError

    def bytes(self, out: int, into: int, scheme: Scheme, dtype: str) -> int:
        """What those take, padding included."""
        stored = self.tensors(out, into, scheme, dtype).values()
        return sum(math.prod(tensor.shape) * BYTES[tensor.dtype] for tensor in stored)

    def pack(self, codes: Codes, scheme: Scheme) -> Tensors:
        """Rows that an algorithm rounded, as entries of the tensors. Formats of floats have none."""
        raise TypeError(f"{type(self).__name__}: floats have no codes")

    def store(self, weight: Weight, start: int, rows: torch.Tensor) -> None:
        """``rows`` [n, into] (floats) from row ``start`` on, rounded to nearest."""
        from tuili.quant.round import round_to_nearest

        weight.fill(start, round_to_nearest(rows, weight.scheme))

    def dequant(self, weight: Weight) -> torch.Tensor:
        """The meaning: the matrix [out, into] in the activations' dtype."""
        raise NotImplementedError

    def matmul(self, weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The speed: ``x`` [rows, into] to [rows, out]."""
        raise NotImplementedError

    def rows(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        """Rows ``ids`` [n] of the matrix (an embedding's): [n, into]."""
        raise NotImplementedError


formats: Registry[type[WeightFormat]] = Registry("weight format", "tuili.quant.formats")


@cache
def format_of(scheme: Scheme, packing: str) -> WeightFormat:
    """The format that takes it. ConfigError for numbers that nothing stores."""
    found = [formats.get(name)() for name in formats.names()]
    for format in found:
        if format.takes(scheme, packing):
            return format
    numbers = {number for format in found for number in format.numbers}
    raise ConfigError(f"nothing stores weights of format {scheme.format!r}.{nearest(scheme.format, numbers)}")


def up(number: int, multiple: int) -> int:
    """``number`` divided by ``multiple``, rounded up."""
    return -(-number // multiple)
