"""What ops are to torch.compile: torch code that it fuses, or calls of the active kernels that it leaves as they are.

Row-wise ops and dense products are fused: as their references, but for two whose references cut rows so that no bit
depends on the batch. That depends on the number of rows, and what is compiled is to serve any; so it gives that up.
Products of packed and rounded weights stay calls: no compiler knows how those lie in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

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


def make_traceable() -> None:
    """Give every op what stands for it in compiled code. Products of whatever weights are ops called ``*_linear``."""
    for name, entry in table.items():
        if entry.traced is not None:
            continue
        if name in AS_THEY_ARE:
            entry.traced = entry.reference
        elif TRACED in entry.implementations:
            entry.traced = entry.implementations[TRACED]
        elif name.endswith("_linear"):
            entry.traced = _opaque(entry)


def _opaque(entry: Op[..., Any]) -> Any:
    """A torch operator that calls ``entry``: rows in (its first argument), as many rows out.

    What one row's result looks like, the reference says.
    """

    def call(*args: Any) -> torch.Tensor:
        return entry.active(*args)

    def shape(x: torch.Tensor, *args: Any) -> torch.Tensor:
        few = entry.reference(x.new_empty((ROW_TILE, *x.shape[1:])), *args)
        return few.new_empty((x.shape[0], *few.shape[1:]))

    schema = torch.library.infer_schema(entry.reference, mutates_args=())
    made = torch.library.custom_op(f"tuili::{entry.name}", call, mutates_args=(), schema=schema)
    made.register_fake(shape)
    return made
