"""Matrices with weights: one place where every projection of every model multiplies."""

from __future__ import annotations

import torch
from torch import nn

from tuili.layers.build import Build
from tuili.quant.place import Place
from tuili.quant.scheme import Scheme
from tuili.quant.weight import Weight


class Matrix(nn.Module):
    """A matrix [out, into]: a parameter, or, for inference, ``stored`` in a format."""

    def __init__(self, out: int, into: int, build: Build):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, into))
        self.kernels = build.kernels
        self.stored: Weight | None = None

    def store(self, scheme: Scheme, place: Place) -> None:
        """Keep the weight as ``scheme`` says, for inference; the parameter and its memory go."""
        self.hold(Weight.of(self.weight.data, scheme, place))

    def hold(self, weight: Weight) -> None:
        """Compute with ``weight`` from now on; the parameter goes."""
        self.stored = weight
        self.register_parameter("weight", None)


class Linear(Matrix):
    """``x`` [rows, in] to [rows, out]. ``parts``: output sizes of the projections fused into the weight, in order."""

    def __init__(self, into: int, parts: tuple[int, ...], bias: bool, build: Build):
        self.parts = parts
        super().__init__(sum(parts), into, build)
        self.bias = nn.Parameter(torch.empty(sum(parts))) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.stored is not None:
            return self.stored.matmul(x, self.bias)
        return self.kernels.linear(x, self.weight, self.bias)


class Embedding(Matrix):
    """Token ids [n] to vectors [n, dim], times ``scale`` rounded to the weight's dtype (Gemma: sqrt(dim)).

    One copy of the weight serves look-up and, where the head is tied, ``scores``.
    """

    def __init__(self, vocab: int, dim: int, scale: float | None, build: Build):
        super().__init__(vocab, dim, build)
        self.scale = scale

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [n, dim] times every token's vector: [n, vocab]. The head of a model whose head is tied."""
        return self.kernels.linear(x, self.weight) if self.stored is None else self.stored.matmul(x)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.kernels.embedding(self.weight, ids) if self.stored is None else self.stored.rows(ids)
        return x if self.scale is None else self.kernels.scale(x, self.scale)
