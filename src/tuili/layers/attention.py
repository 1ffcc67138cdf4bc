"""Multi-head attention with grouped KV heads; where K and V live and who attends is the batch's business."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from tuili.layers.build import Build
from tuili.layers.linear import Linear
from tuili.layers.norm import RMSNorm
from tuili.layers.rope import Angles
from tuili.layers.shapes import projections
from tuili.layers.spec import ModelSpec


class Kind(NamedTuple):
    """How a layer attends: scores times ``scale``, over the last ``window`` positions (None: all), capped."""

    scale: float
    window: int | None = None
    softcap: float | None = None


class AttentionBackend(Protocol):
    """Attends over the KV of ``batch``'s requests, after rotating ``q`` and ``k`` by ``angles`` and storing k and v.

    ``q`` [n, heads, dim], ``k``, ``v`` [n, kv_heads, dim]; returns [n, heads, dim].
    """

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        angles: Angles,
        layer: int,
        batch: Any,
        kv: Any,
        kind: Kind,
    ) -> torch.Tensor: ...


class Batch(Protocol):
    """What layers see of a ForwardBatch: the rows' positions [n] and who attends."""

    @property
    def positions(self) -> torch.Tensor: ...

    @property
    def attention(self) -> AttentionBackend: ...


class Attention(nn.Module):
    def __init__(self, spec: ModelSpec, layer: int, build: Build):
        super().__init__()
        self.layer = layer
        self.dim = spec.head_dim
        self.kind = Kind(spec.scale, spec.window(layer), spec.attention_softcap)
        shapes = projections(spec)
        self.qkv_proj = Linear(*shapes["attention.qkv_proj"], build)
        self.o_proj = Linear(*shapes["attention.o_proj"], build)
        norm = (self.dim, spec.norm_eps, spec.norm_offset, build)
        self.q_norm = RMSNorm(*norm) if spec.qk_norm else None
        self.k_norm = RMSNorm(*norm) if spec.qk_norm else None

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [n, heads, dim], keys and values [n, kv_heads, dim], of ``x`` [n, hidden]."""
        q, k, v = self.qkv_proj(x).split(self.qkv_proj.parts, -1)
        q, k, v = (t.reshape(len(x), -1, self.dim) for t in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, angles: Angles, batch: Batch, kv: Any
    ) -> torch.Tensor:
        return batch.attention.attend(q, k, v, angles, self.layer, batch, kv, self.kind)

    def merge(self, out: torch.Tensor) -> torch.Tensor:
        """What the heads found, ``out`` [n, heads, dim], back in the residual stream: [n, hidden]."""
        return self.o_proj(out.reshape(len(out), -1))
