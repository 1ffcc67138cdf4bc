"""Recording a step: memory for its tensors, and a guard that lets torch compute nothing that a replay would miss."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
ALLOCATIONS = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default}
ALIGNMENT = 64


class Unrecordable(Exception):
    """The model computed something that is no call of the kernels; the message names it."""


@dataclass(eq=False)
class Scratch:
    """Memory that one tensor at a time may have; ``used`` bytes of it were, at most."""

    memory: np.ndarray
    used: int = 0


class Workspace:
    """Memory for the activations of recordings. What is freed while recording is used again, as calls run in order.

    Slots are as large as the largest batch needs them, so recordings of all sizes share them; what no batch has touched
    is not there yet (the system hands out pages at first use).
    """

    def __init__(self, max_rows: int):
        self.max_rows = max_rows
        self._slots: list[Scratch] = []
        #: By their size: all numbers of rows ask for the same ones, so none needs more than another.
        self._free: defaultdict[int, list[Scratch]] = defaultdict(list)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, rows: int) -> torch.Tensor:
        """A tensor of a step of ``rows`` rows. Its memory comes back when the last view of it dies."""
        size = int(np.prod(shape)) * dtype.itemsize
        largest = max(size, size * self.max_rows // rows)
        free = self._free[largest]
        slot = free.pop() if free else self._make(largest)
        slot.used = max(slot.used, size)
        lent = slot.memory[:size]
        weakref.finalize(lent, free.append, slot).atexit = False
        return _tensor(lent, shape, dtype)

    def _make(self, size: int) -> Scratch:
        room = np.empty(size + ALIGNMENT, np.uint8)
        slot = Scratch(room[-room.ctypes.data % ALIGNMENT :][:size])
        self._slots.append(slot)
        return slot

    def find(self, tensor: torch.Tensor) -> np.ndarray | None:
        """The memory here that ``tensor`` begins in, from there on; None if it is elsewhere."""
        for slot in self._slots:
            offset = tensor.data_ptr() - slot.memory.ctypes.data
            if 0 <= offset < len(slot.memory):
                return slot.memory[offset:]
        return None

    def unlent(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` without its claim on the memory: to be read after a replay and before the next one."""
        memory = self.find(tensor)
        if memory is None or not tensor.is_contiguous():
            raise Unrecordable("the step's result is not a tensor that it made")
        return _tensor(memory[: tensor.nbytes], tensor.shape, tensor.dtype)

    def spoil(self) -> None:
        """Overwrite whatever was ever used: what a replay does not compute anew, it can not have."""
        for slot in self._slots:
            slot.memory[: slot.used] = 0xFF


def _tensor(memory: np.ndarray, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(memory).view(dtype).view(tuple(shape))


class _Rules:
    """What a ``Guard`` does. Apart from it, because torch wraps the ``__torch_dispatch__`` of a mode's own class, and
    the wrapper imports torch's compiler at first use (1.2 s of processor time)."""

    workspace: Workspace
    rows: int
    seen: list[torch.Tensor]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in ALLOCATIONS:
            return self.workspace.empty(out.shape, out.dtype, self.rows)
        given = list(_tensors(args))
        made = list(_tensors((out,)))
        memory = {t.untyped_storage().data_ptr() for t in given}
        if func._schema.is_mutable or not made or any(t.untyped_storage().data_ptr() not in memory for t in made):
            raise Unrecordable(f"torch computes {func}, which is no op of the table")
        self.seen += [t for t in given if self.workspace.find(t) is None]
        return out


class Guard(_Rules, TorchDispatchMode):
    """Lets torch make views, gives it memory of ``workspace``, and refuses the rest with Unrecordable."""

    def __init__(self, workspace: Workspace, rows: int):
        super().__init__()
        self.workspace, self.rows = workspace, rows
        #: Tensors of others that were looked at: a call may point into them, so they must stay.
        self.seen = []


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
