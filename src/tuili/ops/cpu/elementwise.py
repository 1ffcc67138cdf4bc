"""The op table's "cpu" implementations of what is elementwise, and of looking rows up. As in ``kernels.py``."""

from __future__ import annotations

from ctypes import c_float

import torch

from tuili.ops.cpu import library as lib
from tuili.ops.cpu.kernels import CODES, _suits
from tuili.ops.table import implement, table


def _plain(*tensors: torch.Tensor) -> bool:
    return _suits(*tensors) and all(t.is_contiguous() for t in tensors)


def _sizes(x: torch.Tensor) -> tuple[int, int, int]:
    """Rows, elements of a row, and the code of the dtype."""
    dim = x.shape[-1] if x.dim() else 1
    return x.numel() // max(dim, 1), dim, CODES[x.dtype]


@implement("add", "cpu")
def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if not _plain(x, y) or x.shape != y.shape:
        return table["add"].reference(x, y)
    out = torch.empty(x.shape, dtype=x.dtype)
    lib.call("add", lib.AddArgs(x.data_ptr(), y.data_ptr(), out.data_ptr(), *_sizes(x)))
    return out


@implement("scale", "cpu")
def scale(x: torch.Tensor, factor: float) -> torch.Tensor:
    if not _plain(x):
        return table["scale"].reference(x, factor)
    out = torch.empty(x.shape, dtype=x.dtype)
    lib.call("scale", lib.ScaleArgs(x.data_ptr(), out.data_ptr(), *_sizes(x), _rounded(factor, x.dtype)))
    return out


def _rounded(factor: float, dtype: torch.dtype) -> float:
    """``factor`` as ``dtype`` holds it. Found with ints: torch would compute, which a recording does not allow."""
    if dtype == torch.float32:
        return factor
    bits = int.from_bytes(c_float(factor), "little")
    bits = bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000
    return c_float.from_buffer_copy(bits.to_bytes(4, "little")).value


@implement("softcap", "cpu")
def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    if not _plain(x):
        return table["softcap"].reference(x, cap)
    out = torch.empty(x.shape, dtype=x.dtype)
    lib.call("softcap", lib.SoftcapArgs(x.data_ptr(), out.data_ptr(), *_sizes(x), cap))
    return out


@implement("embedding", "cpu")
def embedding(weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    if not _plain(weight) or ids.dtype != torch.int64 or ids.dim() != 1 or not ids.is_contiguous():
        return table["embedding"].reference(weight, ids)
    out = torch.empty(len(ids), weight.shape[1], dtype=weight.dtype)
    pointers = (t.data_ptr() for t in (weight, ids, out))
    lib.call("embedding", lib.EmbeddingArgs(*pointers, len(ids), weight.shape[1] * weight.itemsize))
    return out
