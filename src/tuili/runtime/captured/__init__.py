"""Captured steps: those in which every row decodes, written down once per shape and repeated at next to no cost for the
host. ``native``: the calls of the C++ kernels; ``graphs``: CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from tuili.layers.attention import AttentionBackend
from tuili.layers.decoder import Decoder
from tuili.runtime.device import Device
from tuili.runtime.kvstore import KVStore
from tuili.runtime.step import Shape, StepInputs


@dataclass(frozen=True)
class Parts:
    """What every step of a runner computes with: its ``table`` [rows, blocks] of blocks and the ids sampled ``last``
    [rows] stay where they are; the last row is for padding."""

    model: Decoder
    kv: KVStore
    device: Device
    attention: AttentionBackend
    table: torch.Tensor
    last: torch.Tensor


class CapturedSteps(Protocol):
    """``why`` says why nothing is captured, "" where all is well; ``memory`` is where staged arrays go, if they must
    always be in one place."""

    why: str
    memory: torch.Tensor | None

    @property
    def shapes(self) -> list[Shape]:
        """What is captured so far."""
        ...

    def fit(self, step: StepInputs) -> bool:
        """Whether this step is a captured one."""
        ...

    def load(self, step: StepInputs) -> Sequence[np.ndarray]:
        """Take what the host knows of the step: the arrays that have to be staged."""
        ...

    def logits(self, shape: Shape) -> torch.Tensor | None:
        """Scores [requests * positions, vocab] of the step that was loaded, valid until the next one; None if it has to
        run eagerly. Device work."""
        ...
