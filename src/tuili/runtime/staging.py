"""Between the host and a device: everything of a step in one copy there, everything of its result in one copy back.

Where the device is the host nothing is copied, and arrays and tensors are the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from tuili.runtime.device import Device

#: Arrays begin at multiples of this: their numbers take up to so many bytes.
ALIGNMENT = 8
Tensors = Sequence[torch.Tensor]


class Staged(Protocol):
    """Arrays on their way to a device."""

    def unpack(self, into: torch.Tensor | None = None) -> list[torch.Tensor]:
        """The arrays on the device: device work. In the first bytes of ``into`` where it is given."""
        ...


def stage(device: Device, arrays: Sequence[np.ndarray]) -> Staged:
    """``arrays``, which nobody changes any more where the device is the host."""
    return Shared(arrays) if device.is_host else Parcel(device, arrays)


class Shared:
    """Arrays that a processor reads where they are."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self._tensors = [torch.from_numpy(array) for array in arrays]

    def unpack(self, into: torch.Tensor | None = None) -> list[torch.Tensor]:
        return self._tensors


class Parcel:
    """Arrays packed into memory of the host that is this parcel's alone, so that nothing in flight is overwritten:
    torch lends pinned memory again when the copies from it are done."""

    def __init__(self, device: Device, arrays: Sequence[np.ndarray]):
        self._device = device.torch_device
        self._places: list[tuple[int, int, torch.dtype, tuple[int, ...]]] = []
        size = 0
        for array in arrays:
            self._places.append((size, size + array.nbytes, torch.from_numpy(array).dtype, array.shape))
            size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        self._memory = device.host((size,), torch.uint8)
        room = self._memory.numpy()
        for array, (start, end, _, _) in zip(arrays, self._places, strict=True):
            room[start:end] = array.reshape(-1).view(np.uint8)

    def unpack(self, into: torch.Tensor | None = None) -> list[torch.Tensor]:
        if into is None:
            there = torch.empty(self._memory.shape, dtype=torch.uint8, device=self._device)
        else:
            there = into[: len(self._memory)]
        there.copy_(self._memory, non_blocking=True)
        return [there[start:end].view(dtype).view(shape) for start, end, dtype, shape in self._places]


def fetch(device: Device, groups: Sequence[Tensors]) -> list[Tensors]:
    """``groups`` of tensors of the device as they will be on the host when the work that this is part of is done."""
    if device.is_host:
        return list(groups)
    tensors = [tensor for group in groups for tensor in group]
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].itemsize)  # so that none begins at an odd place
    pieces = [tensors[i].reshape(-1).view(torch.uint8) for i in order]
    memory = device.host((sum(map(len, pieces)),), torch.uint8)
    if pieces:
        memory.copy_(pieces[0] if len(pieces) == 1 else torch.cat(pieces), non_blocking=True)
    here = dict(zip(order, memory.split([len(piece) for piece in pieces]), strict=True))
    views = (here[i].view(tensor.dtype).view(tensor.shape) for i, tensor in enumerate(tensors))
    return [tuple(next(views) for _ in group) for group in groups]
