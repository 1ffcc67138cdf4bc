"""Cross-entropy over the vocabulary in slices of rows, so that the scores of a batch never exist all at once."""

from __future__ import annotations

from typing import Any

import torch

#: Rows whose float32 scores exist at once.
SLICE = 512


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of ``-log softmax(hidden @ weight.T)[target]`` over rows with ``target >= 0``; scores and softmax in float32.

    The gradient is made in the forward pass, while a slice's scores are at hand.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        needed = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        dhidden, dweight = torch.zeros_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for rows in targets.ge(0).nonzero().squeeze(1).split(SLICE):
            x, y = hidden[rows], targets[rows, None]
            logs = torch.log_softmax((x @ weight.t()).float(), -1)
            total -= logs.gather(1, y).sum()
            if needed:
                dscores = logs.exp_().scatter_add_(1, y, torch.full_like(y, -1, dtype=logs.dtype)).to(x.dtype)
                dhidden[rows] = dscores @ weight
                dweight += dscores.t() @ x
        ctx.save_for_backward(dhidden, dweight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (scale,) = grads
        dhidden, dweight = ctx.saved_tensors
        return dhidden * scale.to(dhidden.dtype), dweight * scale.to(dweight.dtype), None


def cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed nats of ``hidden`` [n, dim] under ``weight`` [vocab, dim]; ``targets`` [n], negative: not counted."""
    total: torch.Tensor = LinearCrossEntropy.apply(hidden, weight, targets)
    return total
