"""The op table's "cpu" implementations: what ``contract.py`` declares, bound to the library.

What a kernel takes depends on dtypes only, never on the number of rows: choosing by size would let a request's
neighbours change its bits (law 5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tuili.ops.cpu.binding import CODES, bind
from tuili.ops.cpu.contract import KERNELS, LOCATE
from tuili.ops.cpu.library import launcher
from tuili.ops.cpu.packed import pack
from tuili.ops.table import implement, table

for kernel in KERNELS:
    implement(kernel.name, "cpu")(bind(kernel, launcher(kernel.function), table[kernel.name].reference))

locate = bind(LOCATE, launcher(LOCATE.function), None)


@implement("linear", "cpu")
def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Packs at every call: layers hold packed weights instead."""
    wanted = torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad)
    if weight.dtype not in CODES or weight.dtype != x.dtype or wanted or not weight.is_cpu:
        return table["linear"].reference(x, weight, bias)
    product: torch.Tensor = table["packed_linear"].implementations["cpu"](x, pack(weight), len(weight), bias)
    return product


def _wide(store: Callable[..., None]) -> Callable[..., None]:
    """Files hold float16, too."""

    def stored(matrix: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        store(matrix.float() if matrix.dtype == torch.float16 else matrix, *args, **kwargs)

    return stored


for name in ("store_int8", "store_int4"):
    implement(name, "cpu")(_wide(table[name].implementations["cpu"]))
