"""``Kernels``: who computes. A value that models and runners hold, so that two of them may live side by side."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from tuili.base.errors import ConfigError, nearest
from tuili.ops.table import table

Tensors = tuple[torch.Tensor, torch.Tensor]


class Kernels:
    """Every op of the table as an attribute: as ``backend`` implements it, else the parts that it is made of, else the
    reference."""

    add: Callable[..., torch.Tensor]
    add_rms_norm: Callable[..., Tensors]
    argmax: Callable[..., Tensors]
    causal_attention: Callable[..., torch.Tensor]
    draw: Callable[..., Tensors]
    embedding: Callable[..., torch.Tensor]
    gated: Callable[..., torch.Tensor]
    linear: Callable[..., torch.Tensor]
    locate: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]
    logprobs: Callable[..., tuple[torch.Tensor, ...]]
    paged_attention: Callable[..., torch.Tensor]
    rms_norm: Callable[..., torch.Tensor]
    rotate: Callable[..., torch.Tensor]
    rotate_write_kv: Callable[..., torch.Tensor]
    scale: Callable[..., torch.Tensor]
    softcap: Callable[..., torch.Tensor]

    def __init__(self, backend: str):
        self.backend = backend

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in table:
            raise AttributeError(f"no op is called {name!r}.{nearest(name, table)}")
        function = self._find(name)
        setattr(self, name, function)
        return function

    def _find(self, name: str) -> Callable[..., Any]:
        entry = table[name]
        if entry.parts is not None and self.backend not in entry.implementations:
            return partial(entry.parts, self)
        return entry.implementations.get(self.backend, entry.reference)

    def __deepcopy__(self, memo: object) -> Kernels:
        return self

    def __repr__(self) -> str:
        return f"Kernels({self.backend!r})"


@cache
def kernels_of(backend: str) -> Kernels:
    """The kernels called ``backend``. ConfigError for a backend that no op has."""
    known = {name for entry in table.values() for name in entry.implementations}
    if backend not in known:
        raise ConfigError(f"unknown op backend {backend!r}.{nearest(backend, known)}")
    return Kernels(backend)


#: Torch's: what every op means.
REFERENCE = Kernels("reference")
