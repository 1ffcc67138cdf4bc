"""Root-mean-square normalization."""

from __future__ import annotations

import torch
from torch import nn

from tuili.layers.build import REFERENCES, Build


class RMSNorm(nn.Module):
    """``x`` [..., dim] normalized over the last dimension. ``offset`` 1: the weight is a difference to one (Gemma)."""

    def __init__(self, dim: int, eps: float, offset: float = 0.0, build: Build = REFERENCES):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps
        self.offset = offset
        self.kernels = build.kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps, self.offset)

    def add(self, x: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream ``x`` [n, dim] plus ``out``, and that normalized."""
        return self.kernels.add_rms_norm(out, x, self.weight, self.eps, self.offset)
