"""Rows of whole documents, end to end, for training: each attends to itself, densely, and no row is padding."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from tuili.layers.attention import Kind
from tuili.layers.rope import Angles
from tuili.train.kernels import TRAIN


@dataclass(frozen=True)
class TrainBatch:
    """``ids``, ``targets`` [n] (-100: not learned), ``positions`` [n] in the row's document; document i's rows are
    ``starts[i] .. starts[i + 1]``. Satisfies ``layers.attention.Batch``."""

    ids: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    starts: tuple[int, ...]

    @property
    def attention(self) -> DenseAttention:
        return DenseAttention()

    @property
    def learned(self) -> int:
        """Rows that have a target."""
        return int((self.targets >= 0).sum())

    def to(self, device: torch.device) -> TrainBatch:
        return TrainBatch(self.ids.to(device), self.targets.to(device), self.positions.to(device), self.starts)


class DenseAttention:
    """Causal attention of each document over its own K and V; nothing is cached."""

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        angles: Angles,
        layer: int,
        batch: TrainBatch,
        kv: Any,
        kind: Kind,
    ) -> torch.Tensor:
        """``q`` [n, heads, dim], ``k``, ``v`` [n, kv_heads, dim] to [n, heads, dim]."""
        q, k = TRAIN.rotate(q, *angles), TRAIN.rotate(k, *angles)
        parts = []
        for a, b in pairwise(batch.starts):
            out = TRAIN.causal_attention(q[None, a:b], k[None, a:b], v[None, a:b], *kind)
            parts.append(out[0])
        return torch.cat(parts)
