"""Matrices with weights: one place where every projection of every model multiplies."""

from __future__ import annotations

import torch
from torch import nn

from tuili import ops


class Linear(nn.Module):
    """``x`` [rows, in] to [rows, out]. ``parts``: output sizes of the projections fused into the weight, in order."""

    def __init__(self, into: int, parts: int | tuple[int, ...], bias: bool = False):
        super().__init__()
        self.parts = (parts,) if isinstance(parts, int) else parts
        self.weight = nn.Parameter(torch.empty(sum(self.parts), into))
        self.bias = nn.Parameter(torch.empty(sum(self.parts))) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """Token ids [n] to vectors [n, dim], times ``scale`` rounded to the weight's dtype (Gemma: sqrt(dim))."""

    def __init__(self, vocab: int, dim: int, scale: float | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, dim))
        self.scale = scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = ops.embedding(self.weight, ids)
        return x if self.scale is None else x * torch.tensor(self.scale, dtype=x.dtype)
