"""What ops are to torch.compile: torch code that it fuses, or calls of kernels that it leaves as they are.

Row-wise ops and dense products are fused: as their references, but for two whose references cut rows so that no bit
depends on the batch. That depends on the number of rows, and what is compiled is to serve any; so it gives that up.
Products of packed and rounded weights stay calls: no compiler knows how those lie in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from tuili.ops.kernels import Kernels
from tuili.ops.reference import ROW_TILE, activate
from tuili.ops.table import Op, implement, table

#: The op table's name for them, so that they are held to the references as any implementation is.
TRACED = "traced"
#: References that are traced as they are.
AS_THEY_ARE = ("add", "add_rms_norm", "rms_norm", "rotate", "scale", "softcap")


@implement("linear", TRACED)
def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(x, weight, bias)


@implement("gated", TRACED)
def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return activate(gate, activation) * up


class Traced(Kernels):
    """What stands for ``kernels`` in compiled code. Products of whatever weights are ops called ``*_linear``."""

    def __init__(self, kernels: Kernels):
        super().__init__(TRACED)
        self.kernels = kernels
        for name in table:  # now: nothing is looked up while torch traces
            getattr(self, name)

    def _find(self, name: str) -> Callable[..., Any]:
        entry = table[name]
        if name in AS_THEY_ARE:
            return entry.reference
        if TRACED in entry.implementations:
            return entry.implementations[TRACED]
        return _opaque(entry, self.kernels) if name.endswith("_linear") else getattr(self.kernels, name)


@cache
def _opaque(entry: Op[..., Any], kernels: Kernels) -> Any:
    """A torch operator that calls ``entry``: rows in (its first argument), as many rows out.

    What one row's result looks like, the reference says.
    """
    function = getattr(kernels, entry.name)

    def call(*args: Any) -> torch.Tensor:
        return function(*args)

    def shape(x: torch.Tensor, *args: Any) -> torch.Tensor:
        few = entry.reference(x.new_empty((ROW_TILE, *x.shape[1:])), *args)
        return few.new_empty((x.shape[0], *few.shape[1:]))

    schema = torch.library.infer_schema(entry.reference, mutates_args=())
    made = torch.library.custom_op(f"tuili::{entry.name}_{kernels.backend}", call, mutates_args=(), schema=schema)
    made.register_fake(shape)
    return made
