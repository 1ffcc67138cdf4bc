"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) and Muon (Jordan et al. 2024; scale of Liu et al. 2025,
arXiv:2502.16982) over float32 master weights. All state is in named tensors, so that a checkpoint needs no pickle."""

from __future__ import annotations

import torch

from tuili.layers.decoder import Decoder
from tuili.layers.linear import Linear

EPS = 1e-8


class Optimizer:
    """Updates ``master`` in place. With ``muon``, projections follow Muon, all else (embedding, norms) AdamW. Muon's
    matrices are orthogonalized in ``dtype``."""

    def __init__(
        self,
        model: Decoder,
        master: dict[str, torch.Tensor],
        muon: bool,
        betas: tuple[float, float],
        decay: float,
        dtype: torch.dtype,
    ):
        self.master, self.betas, self.decay, self.dtype = master, betas, decay, dtype
        linears = [(name, m) for name, m in model.named_modules() if isinstance(m, Linear) and muon]
        #: Weights that follow Muon, and the sizes of the projections fused into them.
        self.parts = {f"{name}.weight": m.parts for name, m in linears}
        self.state = {f"{name}.first": torch.zeros_like(w) for name, w in master.items()}
        self.state |= {f"{name}.second": torch.zeros_like(w) for name, w in master.items() if name not in self.parts}

    def update(self, name: str, grad: torch.Tensor, lr: float, count: int) -> None:
        """One update of weight ``name`` at rate ``lr``; ``count`` is the step's number, from 1."""
        weight = self.master[name]
        change = self._muon(name, grad) if name in self.parts else self._adam(name, grad, count)
        if weight.dim() > 1:
            weight.mul_(1 - lr * self.decay)
        weight.add_(change, alpha=-lr)

    def _adam(self, name: str, grad: torch.Tensor, count: int) -> torch.Tensor:
        first, second = self.state[f"{name}.first"], self.state[f"{name}.second"]
        fast, slow = self.betas
        first.lerp_(grad, 1 - fast)
        second.lerp_(grad.square(), 1 - slow)
        return (first / (1 - fast**count)) / ((second / (1 - slow**count)).sqrt() + EPS)

    def _muon(self, name: str, grad: torch.Tensor) -> torch.Tensor:
        """Orthogonalized momentum of each fused projection, scaled to the root mean square of an AdamW update."""
        first = self.state[f"{name}.first"]
        first.lerp_(grad, 0.05)
        ahead = torch.lerp(grad, first, 0.95)
        pieces = [orthogonalize(p, self.dtype) * (0.2 * max(p.shape) ** 0.5) for p in ahead.split(self.parts[name])]
        return torch.cat(pieces)


def orthogonalize(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The matrix with its singular values moved near 1 (0.7 to 1.2) by five Newton-Schulz steps in ``dtype``."""
    x = matrix.to(dtype)
    tall = x.shape[0] > x.shape[1]
    x = x.t() if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.t()
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.t() if tall else x).float()
