"""A matrix as it lies in a checkpoint's files: one tensor, or several one after another; read in slices of rows.

The files are memory-mapped; pages that were read are given back at once, so that loading takes no memory of its own.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from tuili.base.errors import ModelError

if TYPE_CHECKING:
    import torch

    from tuili.models.quantized.layout import Layout
    from tuili.quant.scheme import Scheme
    from tuili.quant.weight import Codes

#: By the C library; None where there is none to ask.
_madvise = ctypes.CDLL(None).madvise if sys.platform == "linux" else None
MADV_DONTNEED = 4


class FloatPart:
    """A tensor of floats."""

    layout = None

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.rows = tensor, len(tensor)

    def read(self, start: int, end: int) -> torch.Tensor:
        """Rows [start, end): a view of the file."""
        return self.tensor[start:end]

    def release(self, start: int, end: int) -> None:
        """Rows [start, end) are not wanted any more: their pages are dropped from this process."""
        release(self.tensor[start:end])


class CodedPart:
    """A rounded matrix [rows, into]: ``files`` of a ``module`` in a ``layout``, its codes as ``scheme`` wants them."""

    def __init__(
        self, module: str, layout: Layout, files: Mapping[str, torch.Tensor], scheme: Scheme, rows: int, into: int
    ):
        self.module, self.layout, self.files = module, layout, files
        self.scheme, self.rows, self.into = scheme, rows, into

    def read(self, start: int, end: int) -> Codes:
        """Rows [start, end). ModelError for codes of more bits than the scheme's, and scales that are not finite."""
        codes = self.layout.codes(self.files, self.scheme, self.rows, self.into, start, end)
        if not bool(codes.scales.isfinite().all()):
            raise ModelError(f"{self.module}: some of its scales are NaN or infinite; quantize it again")
        four = (codes.values, codes.zeros) if self.scheme.format == "int4" else ()
        if any(int(numbers.max()) > 15 for numbers in four if numbers is not None):
            raise ModelError(f"{self.module}: some of its codes are outside of -8..7, and config.json says 4 bits")
        return codes

    def scales(self) -> torch.Tensor:
        return self.layout.scales(self.files, self.rows, self.into).float()

    def release(self, start: int, end: int) -> None:
        """As ``FloatPart.release``; tensors that are not in rows go with the last one."""
        for tensor in self.files.values():
            if tensor.dim() and len(tensor) == self.rows:
                release(tensor[start:end])
            elif end == self.rows:
                release(tensor)


class WeightSource:
    """``parts``, on top of each other."""

    def __init__(self, parts: Sequence[FloatPart | CodedPart]):
        self.parts = parts
        self._ends = list(accumulate(part.rows for part in parts))

    def read(self, start: int, end: int) -> torch.Tensor | Codes:
        """Rows [start, end): a view of the file, or a copy where two parts meet, or codes."""
        pieces = [part.read(first, last) for part, first, last in self._pieces(start, end)]
        return pieces[0] if len(pieces) == 1 else _join(pieces)

    def release(self, start: int, end: int) -> None:
        """Rows [start, end) are not wanted any more."""
        for part, first, last in self._pieces(start, end):
            part.release(first, last)

    def _pieces(self, start: int, end: int) -> Iterator[tuple[FloatPart | CodedPart, int, int]]:
        for part, stop in zip(self.parts, self._ends, strict=True):
            begin = stop - part.rows
            if start < stop and end > begin:
                yield part, max(start, begin) - begin, min(end, stop) - begin


def _join(pieces: list[Any]) -> torch.Tensor | Codes:
    import torch  # here: scanning this folder for families must work without it

    return torch.cat(pieces) if isinstance(pieces[0], torch.Tensor) else type(pieces[0]).join(pieces)


def release(tensor: torch.Tensor) -> None:
    """The pages that lie wholly in ``tensor``, a view of a file, are dropped from this process."""
    if _madvise is None or not tensor.is_contiguous():
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        _madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_DONTNEED)
