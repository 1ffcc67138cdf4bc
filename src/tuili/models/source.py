"""A matrix as it lies in a checkpoint's files: one tensor, or several one after another; read in slices of rows.

The files are memory-mapped; pages that were read are given back at once, so that loading takes no memory of its own.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: By the C library; None where there is none to ask.
_madvise = ctypes.CDLL(None).madvise if sys.platform == "linux" else None
MADV_DONTNEED = 4


class Source:
    """``parts``, on top of each other."""

    def __init__(self, parts: Sequence[torch.Tensor]):
        self.parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def read(self, start: int, end: int) -> torch.Tensor:
        """Rows [start, end): a view of the file, or a copy where two parts meet."""
        pieces = self._pieces(start, end)
        if len(pieces) == 1:
            return pieces[0]
        import torch  # here: scanning this folder for families must work without it

        return torch.cat(pieces)

    def release(self, start: int, end: int) -> None:
        """Rows [start, end) are not wanted any more: their pages are dropped from this process."""
        for piece in self._pieces(start, end):
            first = -(-piece.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (piece.data_ptr() + piece.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if _madvise is not None and last > first:
                _madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_DONTNEED)

    def _pieces(self, start: int, end: int) -> list[torch.Tensor]:
        found = []
        for part, stop in zip(self.parts, self._ends, strict=True):
            begin = stop - len(part)
            if start < stop and end > begin:
                found.append(part[max(start, begin) - begin : min(end, stop) - begin])
        return found
