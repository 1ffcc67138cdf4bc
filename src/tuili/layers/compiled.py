"""``--compile``: what lies before and after attention, in every block, fused by torch.compile.

Two functions serve all blocks, so that start-up does not take longer for a deeper model. Compiled once for one row and
once for any other number, by a call with zeros: no step compiles anything. Attention stays the call that it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any

import torch

from tuili.layers.decoder import Block, Decoder
from tuili.layers.linear import Matrix
from tuili.ops.compiled import Traced
from tuili.ops.kernels import Kernels

#: Numbers of rows to compile for: one is special to torch, the other stands for all others, whose loops are laid out
#: as it wants them.
ROWS = (64, 1)


def _compile(kind: type[Block]) -> dict[str, Callable[..., Any]]:
    """What a block does before and after attention, compiled once for all blocks of its kind."""
    parts: dict[str, Callable[..., Any]] = {"before": kind.before, "after": kind.after}
    return {name: torch.compile(part, fullgraph=True) for name, part in parts.items()}


class Compiled:
    """The blocks of ``model``, compiled in ``seconds``; ``off`` has every op called anew again, until ``on``.

    Needs a C++ compiler, on CUDA Triton too.
    """

    def __init__(self, model: Decoder):
        began = time.perf_counter()
        self.model = model
        self._traced = Traced(model.kernels)
        self._parts = {kind: _compile(kind) for kind in dict.fromkeys(map(type, model.blocks))}
        self.on()
        for rows in ROWS:
            _warm_up(model, rows)
        self.seconds = time.perf_counter() - began

    def on(self) -> None:
        for layer in self.model.blocks:
            vars(layer).update({name: MethodType(part, layer) for name, part in self._parts[type(layer)].items()})
        self._compute_with(self._traced)

    def off(self) -> None:
        for layer in self.model.blocks:
            for name in self._parts[type(layer)]:
                vars(layer).pop(name, None)
        self._compute_with(self.model.kernels)

    def _compute_with(self, kernels: Kernels) -> None:
        """In what is compiled: the blocks, and the last norm."""
        for module in (*self.model.layers.modules(), self.model.norm):
            if "kernels" in vars(module):
                vars(module)["kernels"] = kernels
            if isinstance(module, Matrix) and module.stored is not None:
                module.stored = replace(module.stored, kernels=kernels)


@torch.inference_mode()
def _warm_up(model: Decoder, rows: int) -> None:
    """Call what is compiled with ``rows`` rows, which may be any other number, unless it is one."""
    spec, device = model.spec, model.norm.weight.device
    x = torch.zeros(rows, spec.hidden_size, dtype=model.dtype, device=device)
    heads = torch.zeros(rows, spec.num_heads, spec.head_dim, dtype=model.dtype, device=device)
    if rows > 1:
        for tensor in (x, heads):
            torch._dynamo.mark_dynamic(tensor, 0)
    for block, norm in zip(model.blocks, model.norms[1:], strict=True):
        block.before(x)
        block.after(x, heads, norm)
