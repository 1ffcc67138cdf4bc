"""Where weights are kept, and so who multiplies them: this machine's memory for the C++ kernels, or a device's."""

from __future__ import annotations

from typing import Protocol

import torch

from tuili.ops import REFERENCE, Kernels
from tuili.ops.cpu import Arena
from tuili.ops.triton import FAST, INVARIANT

#: Bytes that travel to a CUDA device at once.
STAGED = 32 << 20


class Place(Protocol):
    """``packing``: in whose order weights are kept there ("cpu" or "triton", see ``formats.format_of``), and the
    ``kernels`` that multiply them."""

    packing: str
    kernels: Kernels
    device: torch.device

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor there."""

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` there."""


class DeviceMemory:
    """A device's own memory. What comes to a CUDA device passes through page-locked memory, one half of which is filled
    while the other travels."""

    packing = "triton"

    def __init__(self, device: torch.device, kernels: Kernels = REFERENCE):
        self.device, self.kernels = device, kernels
        self._halves: list[torch.Tensor] = []
        self._free: list[torch.cuda.Event] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cuda" or tensor.is_cuda or not 0 < tensor.nbytes <= STAGED:
            return tensor.to(self.device)
        if not self._halves:
            self._halves = [torch.empty(STAGED, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            self._free = [torch.cuda.Event() for _ in range(2)]
        half, free = self._halves.pop(0), self._free.pop(0)
        free.synchronize()  # of an event that was never recorded: at once
        staged = half[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        staged.copy_(tensor)
        there = staged.to(self.device, non_blocking=True)
        free.record(torch.cuda.current_stream(self.device))
        self._halves.append(half)
        self._free.append(free)
        return there


def place_on(device: torch.device | str = "cpu", kernels: Kernels = REFERENCE) -> Place:
    """Memory on ``device`` for ``kernels``. On the CPU it is in the C++ kernels' order, unless they are Triton's
    (interpreted)."""
    device = torch.device(device)
    if device.type == "cpu" and kernels.backend not in (FAST, INVARIANT):
        return Arena(kernels)
    return DeviceMemory(device, kernels)
