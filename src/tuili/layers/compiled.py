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

from tuili.layers.decoder import Decoder
from tuili.layers.linear import Matrix
from tuili.ops.compiled import Traced
from tuili.ops.kernels import Kernels

#: Numbers of rows to compile for: one is special to torch, the other stands for all others, whose loops are laid out
#: as it wants them.
ROWS = (64, 1)


class Compiled:
    """The blocks of ``model``, compiled in ``seconds``; ``off`` has every op called anew again, until ``on``.

    Needs a C++ compiler, on CUDA Triton too.
    """

    def __init__(self, model: Decoder):
        began = time.perf_counter()
        self.model = model
        self._traced = Traced(model.kernels)
        parts: dict[str, Callable[..., Any]] = {"before": model.block.before, "after": model.block.after}
        self._parts = {name: torch.compile(part, fullgraph=True) for name, part in parts.items()}
        self.on()
        for rows in ROWS:
            _warm_up(model, rows)
        self.seconds = time.perf_counter() - began

    def on(self) -> None:
        for layer in self.model.layers:
            vars(layer).update({name: MethodType(part, layer) for name, part in self._parts.items()})
        self._compute_with(self._traced)

    def off(self) -> None:
        for layer in self.model.layers:
            for name in self._parts:
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
