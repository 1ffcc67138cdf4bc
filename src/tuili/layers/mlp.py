"""The gated feed-forward block (SwiGLU, GeGLU; Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

import torch
from torch import nn

from tuili import ops
from tuili.layers.linear import Linear


class GatedMLP(nn.Module):
    def __init__(self, dim: int, inner: int, activation: str, bias: bool = False):
        super().__init__()
        self.gate_up_proj = Linear(dim, (inner, inner), bias)
        self.down_proj = Linear(inner, dim, bias)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(ops.gated(self.gate_up_proj(x), self.activation))
