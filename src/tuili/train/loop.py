"""The gradient of a batch: replicas of the model, each in its own thread, share it; sums are in float32.

Threads of one core each meet once per step, where OpenMP threads meet in every op, so that another process on a core
costs its share and no more. Which rows a replica takes, and the order of sums, are fixed: same recipe, same bits.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn

from tuili.layers.build import Build
from tuili.layers.decoder import Decoder
from tuili.layers.spec import ModelSpec
from tuili.models import make_decoder
from tuili.train.batch import TrainBatch
from tuili.train.kernels import TRAIN
from tuili.train.loss import cross_entropy


def initialize(model: Decoder, seed: int) -> None:
    """Matrices normal(0, 0.02), what writes to the residual stream over ``sqrt(2 * layers)`` (GPT-2); norms one."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            nn.init.ones_(weight)
            continue
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 / (2 * model.spec.num_layers) ** 0.5 if residual else 0.02
        nn.init.normal_(weight, std=std, generator=generator)


class Replica:
    """A copy of the model in the training dtype, and the float32 sum of its gradients."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device):
        self.model = make_decoder(spec, Build(TRAIN)).to(device=device, dtype=dtype)
        self.model.prepare(spec.max_model_len)
        self.device = device
        self.grads = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in self.model.named_parameters()}

    @torch.no_grad()
    def read(self, master: dict[str, torch.Tensor]) -> None:
        for name, weight in self.model.named_parameters():
            weight.copy_(master[name])

    def loss(self, batch: TrainBatch) -> torch.Tensor:
        """Summed loss of ``batch``'s learned rows, in nats."""
        batch = batch.to(self.device)
        hidden = self.model(self.model.embed(batch.ids), batch, None)
        head = self.model.embedding if self.model.head is None else self.model.head
        return cross_entropy(hidden, head.weight, batch.targets)

    def accumulate(self, batches: list[TrainBatch], learned: int) -> float:
        """Set ``grads`` to the gradient of the loss per learned token; returns the summed loss."""
        for grad in self.grads.values():
            grad.zero_()
        total = 0.0
        for batch in batches:
            loss = self.loss(batch)
            (loss / learned).backward()
            total += loss.item()
            for name, weight in self.model.named_parameters():
                assert weight.grad is not None
                self.grads[name] += weight.grad
                weight.grad = None
        return total

    @torch.no_grad()
    def evaluate(self, batches: list[TrainBatch]) -> float:
        return sum(self.loss(batch).item() for batch in batches)


@dataclass(frozen=True)
class StepReport:
    """``loss`` in nats per learned token; ``norm`` of the gradient before clipping."""

    loss: float
    norm: float
    tokens: int
    learned: int


class Team:
    """Replicas that work on one batch together."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device, workers: int):
        self.replicas = [Replica(spec, dtype, device) for _ in range(workers)]
        self.threads = ThreadPoolExecutor(workers, initializer=self._one_core if device.type == "cpu" else None)

    @staticmethod
    def _one_core() -> None:
        torch.set_num_threads(1)

    def read(self, master: dict[str, torch.Tensor]) -> None:
        for replica in self.replicas:
            replica.read(master)

    def gradient(self, batches: list[TrainBatch]) -> tuple[dict[str, torch.Tensor], float]:
        """Gradient of the loss per learned token over ``batches``, and that loss."""
        learned = sum(b.learned for b in batches)
        jobs = [
            self.threads.submit(replica.accumulate, share, learned)
            for replica, share in zip(self.replicas, shares(batches, len(self.replicas)), strict=True)
        ]
        total = sum(job.result() for job in jobs)
        first, *rest = self.replicas
        for replica in rest:
            for name, grad in first.grads.items():
                grad += replica.grads[name]
        return first.grads, total / learned

    def evaluate(self, batches: list[TrainBatch]) -> float:
        """Loss per learned token of ``batches``."""
        jobs = [
            self.threads.submit(replica.evaluate, share)
            for replica, share in zip(self.replicas, shares(batches, len(self.replicas)), strict=True)
        ]
        return sum(job.result() for job in jobs) / sum(b.learned for b in batches)

    def close(self) -> None:
        self.threads.shutdown()


def shares(batches: list[TrainBatch], workers: int) -> list[list[TrainBatch]]:
    """``batches`` dealt out so that every worker has about as many rows; longest first, to the least busy."""
    dealt: list[list[TrainBatch]] = [[] for _ in range(workers)]
    rows = [0] * workers
    for batch in sorted(batches, key=lambda b: -len(b.ids)):
        least = rows.index(min(rows))
        dealt[least].append(batch)
        rows[least] += len(batch.ids)
    return dealt


def clip(grads: dict[str, torch.Tensor], limit: float) -> float:
    """Scale ``grads`` in place so that their common norm is at most ``limit`` (0: no limit); returns that norm."""
    norm = torch.stack([g.norm() for g in grads.values()]).norm().item()
    if limit and norm > limit:
        for grad in grads.values():
            grad *= limit / norm
    return norm
