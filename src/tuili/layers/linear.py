"""Matrices with weights: one place where every projection of every model multiplies."""

from __future__ import annotations

import torch
from torch import nn

from tuili import ops
from tuili.ops.cpu import Arena
from tuili.quant.scheme import Scheme
from tuili.quant.weight import Weight


class Linear(nn.Module):
    """``x`` [rows, in] to [rows, out]. ``parts``: output sizes of the projections fused into the weight, in order."""

    def __init__(self, into: int, parts: int | tuple[int, ...], bias: bool = False):
        super().__init__()
        self.parts = (parts,) if isinstance(parts, int) else parts
        self.weight = nn.Parameter(torch.empty(sum(self.parts), into))
        self.bias = nn.Parameter(torch.empty(sum(self.parts))) if bias else None
        self.stored: Weight | None = None

    def store(self, scheme: Scheme, arena: Arena) -> None:
        """Keep the weight as ``scheme`` says, for inference; the parameter and its memory go."""
        self.stored = Weight.of(self.weight.data, scheme, arena)
        self.register_parameter("weight", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.stored is not None:
            return self.stored.matmul(x, self.bias)
        return ops.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """Token ids [n] to vectors [n, dim], times ``scale`` rounded to the weight's dtype (Gemma: sqrt(dim))."""

    def __init__(self, vocab: int, dim: int, scale: float | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, dim))
        self.scale = scale
        self.stored: Weight | None = None

    def store(self, scheme: Scheme, arena: Arena) -> None:
        """As ``Linear.store``. One copy serves look-up and, where the head is tied, ``scores``."""
        self.stored = Weight.of(self.weight.data, scheme, arena)
        self.register_parameter("weight", None)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [n, dim] times every token's vector: [n, vocab]. The head of a model whose head is tied."""
        return ops.linear(x, self.weight) if self.stored is None else self.stored.matmul(x)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = ops.embedding(self.weight, ids) if self.stored is None else self.stored.rows(ids)
        return x if self.scale is None else ops.scale(x, self.scale)
