"""Training kernels where torch's own are slow on a CPU; implementations of the op table, held to its references.

Measured on 2 cores of an EPYC (Zen 4), bf16, 1000 tokens, 4 heads of 64: torch's flash kernel takes 10 + 19 ms
(forward + backward), the blocks below 6 + 10 ms.
"""

from __future__ import annotations

from typing import Any

import torch

from tuili.ops import implement, kernels_of
from tuili.ops import table as ops_table

#: Queries per block: keys behind a block are skipped, its own triangle is masked.
BLOCK = 256


class BlockedAttention(torch.autograd.Function):
    """Causal attention in blocks of queries. ``q`` [kv_heads, group, t, dim]; ``k``, ``v`` [kv_heads, t, dim]."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        kv_heads, group, t, dim = q.shape
        mask = torch.full((BLOCK, BLOCK), -torch.inf, dtype=q.dtype).triu(1)
        out = torch.empty_like(q)
        weights = []
        for s in range(0, t, BLOCK):
            e = min(s + BLOCK, t)
            n = e - s
            scores = torch.bmm(q[:, :, s:e].reshape(kv_heads, group * n, dim) * scale, k[:, :e].transpose(1, 2))
            scores.view(kv_heads, group, n, e)[..., s:] += mask[:n, :n]
            weights.append(torch.softmax(scores, -1))
            out[:, :, s:e] = torch.bmm(weights[-1], v[:, :e]).view(kv_heads, group, n, dim)
        ctx.save_for_backward(q, k, v, *weights)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (dout,) = grads
        q, k, v, *weights = ctx.saved_tensors
        kv_heads, group, t, dim = q.shape
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i, w in enumerate(weights):
            s, e = i * BLOCK, min(i * BLOCK + BLOCK, t)
            n = e - s
            rows = dout[:, :, s:e].reshape(kv_heads, group * n, dim)
            dv[:, :e] += torch.bmm(w.transpose(1, 2), rows)
            dw = torch.bmm(rows, v[:, :e].transpose(1, 2))
            dscores = torch._softmax_backward_data(dw, w, -1, w.dtype)
            dq[:, :, s:e] = torch.bmm(dscores, k[:, :e]).view(kv_heads, group, n, dim) * ctx.scale
            dk[:, :e] += torch.bmm(dscores.transpose(1, 2), q[:, :, s:e].reshape(kv_heads, group * n, dim)) * ctx.scale
        return dq, dk, dv, None


@implement("causal_attention", "train")
def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """As the op says; windows and soft caps go to the reference."""
    if window is not None or softcap is not None or q.device.type != "cpu":
        return ops_table["causal_attention"].reference(q, k, v, scale, window, softcap)
    b, t, heads, dim = q.shape
    kv_heads = k.shape[2]
    wide = q.view(b, t, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4).reshape(-1, heads // kv_heads, t, dim)
    k, v = (x.transpose(1, 2).reshape(b * kv_heads, t, dim) for x in (k, v))
    out = BlockedAttention.apply(wide, k, v, scale)
    return out.view(b, heads, t, dim).transpose(1, 2)


#: What training computes with; the ops that it has no kernels of its own for are the references.
TRAIN = kernels_of("train")
