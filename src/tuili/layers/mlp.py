"""The gated feed-forward block (SwiGLU, GeGLU; Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

import torch
from torch import nn

from tuili.layers.build import Build
from tuili.layers.linear import Linear
from tuili.layers.shapes import projections
from tuili.layers.spec import ModelSpec


class GatedMLP(nn.Module):
    def __init__(self, spec: ModelSpec, build: Build):
        super().__init__()
        shapes = projections(spec)
        self.gate_up_proj = Linear(*shapes["mlp.gate_up_proj"], build)
        self.down_proj = Linear(*shapes["mlp.down_proj"], build)
        self.activation = spec.activation
        self.kernels = build.kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.kernels.gated(self.gate_up_proj(x), self.activation))
