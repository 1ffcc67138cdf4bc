"""On a card (``TRITON_INTERPRET=0``, as `make gpu-check` says) these tests run there: tensors travel to it and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tuili import ops
from tuili.ops import triton

ON_CARD = triton.describe().usable and not triton.describe().interpreted


@pytest.fixture(autouse=ON_CARD)
def _on_the_card() -> Iterator[None]:
    """Every Triton implementation takes tensors of the CPU, and gives such."""
    before = {name: dict(entry.implementations) for name, entry in ops.table.items()}
    for entry in ops.table.values():
        for backend in (triton.FAST, triton.INVARIANT):
            if backend in entry.implementations:
                entry.implementations[backend] = travelling(entry.implementations[backend])
    yield
    for name, implementations in before.items():
        ops.table[name].implementations.update(implementations)


def travelling(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        there = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]
        made = kernel(*there, **kwargs)
        for one, other in zip(args, there, strict=True):
            if isinstance(one, torch.Tensor):
                one.copy_(other)  # it may have been written to
        return tuple(t.cpu() for t in made) if isinstance(made, tuple) else made if made is None else made.cpu()

    return call
