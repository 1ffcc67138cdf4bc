"""Rotary angles for positions: one ``Rope`` per distinct setting of a model, looked up once per forward."""

from __future__ import annotations

import torch

from tuili.base.errors import ModelError
from tuili.layers.spec import RopeSpec

Angles = tuple[torch.Tensor, torch.Tensor]


def frequencies(spec: RopeSpec) -> torch.Tensor:
    """Angle per position of each rotated pair, float32 [dim / 2]."""
    plain = 1.0 / spec.theta ** (torch.arange(0, spec.dim, 2, dtype=torch.int64).float() / spec.dim)
    if spec.kind == "default":
        return plain
    raise ModelError(f"rope scaling {spec.kind!r} is not known")


class Rope:
    """cos and sin of every position up to ``max_len``, float32 [max_len, dim / 2]."""

    def __init__(self, spec: RopeSpec, max_len: int):
        angle = torch.outer(torch.arange(max_len).float(), frequencies(spec))
        self.cos, self.sin = angle.cos(), angle.sin()

    def at(self, positions: torch.Tensor) -> Angles:
        """cos, sin for ``positions`` [n]: each [n, dim / 2]."""
        return self.cos[positions], self.sin[positions]
