"""``--compile``: what lies before and after attention, in every block, fused by torch.compile.

Two functions serve all blocks, so that start-up does not take longer for a deeper model. Compiled once for one row and
once for any other number, by a call with zeros: no step compiles anything. Attention stays the call that it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import torch

from tuili.layers.decoder import Block, Decoder
from tuili.ops.compiled import make_traceable

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
        make_traceable()
        parts: dict[str, Callable[..., Any]] = {"before": model.block.before, "after": model.block.after}
        self._parts = {name: torch.compile(part, fullgraph=True) for name, part in parts.items()}
        self.on()
        for rows in ROWS:
            _warm_up(model, rows)
        self.seconds = time.perf_counter() - began

    def on(self) -> None:
        for layer in self.model.layers:
            vars(layer).update({name: MethodType(part, layer) for name, part in self._parts.items()})

    def off(self) -> None:
        for layer in self.model.layers:
            for name in self._parts:
                vars(layer).pop(name, None)


@torch.inference_mode()
def _warm_up(model: Decoder, rows: int) -> None:
    """Call what is compiled with ``rows`` rows, which may be any other number, unless it is one."""
    spec, device = model.spec, model.norm.weight.device
    positions = torch.zeros(rows, dtype=torch.int64, device=device)
    x = torch.zeros(rows, spec.hidden_size, dtype=model.dtype, device=device)
    heads = torch.zeros(rows, spec.num_heads, spec.head_dim, dtype=model.dtype, device=device)
    for layer, block in enumerate(cast(list[Block], model.layers)):
        angles = model.angles(positions)[spec.window(layer) is not None]
        for tensor in (x, heads, *angles):
            if rows > 1:
                torch._dynamo.mark_dynamic(tensor, 0)
        block.before(x, angles)
        block.after(x, heads)
