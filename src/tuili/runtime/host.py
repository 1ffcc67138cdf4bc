"""``Host``: the processor as a ``Device``; ``Interpreter``: where Triton's interpreter stands for a card."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from tuili.base import hardware

T = TypeVar("T")


@dataclass(frozen=True)
class _Done(Generic[T]):
    """Work that was done when it was submitted."""

    returned: T
    seconds: float

    def wait(self) -> T:
        return self.returned


class Host:
    """Does everything at once; what it captures, it calls again."""

    is_host = True

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    def host(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    def submit(self, work: Callable[[], T]) -> _Done[T]:
        began = time.perf_counter()
        with torch.inference_mode():
            returned = work()
        return _Done(returned, time.perf_counter() - began)

    def capture(self, function: Callable[[], object]) -> Callable[[], None]:
        def again() -> None:
            function()

        return again

    def memory(self) -> tuple[int, int]:
        return hardware.memory()

    def close(self) -> None:
        """Nothing is left to wait for."""


class Interpreter(Host):
    """The path of a card, without one: everything is copied there and back, and KV lies as a card reads it."""

    is_host = False
