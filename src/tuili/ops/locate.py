"""What a decode step's rows are, told by the block table of a runner that keeps it on a device."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tuili.ops.samples import each_dtype
from tuili.ops.table import Sample, op


def _samples() -> list[Sample]:
    def args(g: torch.Generator, _: torch.dtype, n: int, columns: int, block_size: int) -> tuple[Any, ...]:
        """Rows of a table of six, the last ones padding; inputs are a part of something wider."""
        inputs = torch.zeros(4, n + 2, dtype=torch.long)
        inputs[0] = torch.cat((torch.randperm(5, generator=g), torch.full((n,), 5)))[: n + 2]
        inputs[1] = torch.randint(0, columns * block_size, (n + 2,), generator=g)
        inputs[2] = torch.randint(0, 90, (n + 2,), generator=g)
        inputs[3] = torch.randint(0, 2, (n + 2,), generator=g)
        last = torch.randint(90, 99, (6,), generator=g)
        return inputs[:, :n], last, torch.randint(0, 70, (6, columns), generator=g), block_size

    return [
        sample
        for n, columns, size in ((1, 1, 16), (4, 9, 8), (7, 1500, 5))
        for sample in each_dtype(f"{n} of {columns}", partial(args, n=n, columns=columns, block_size=size))
    ]


@op(_samples)
def locate(
    inputs: torch.Tensor, last: torch.Tensor, table: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, slots, context lengths [n] and block table [n, blocks] of a step in which ``n`` rows decode.

    ``inputs`` [4, n] int64: each one's row in ``last`` [rows] and ``table`` [rows, blocks], its position, its id, and
    whether that is known; where not, the id is the row's ``last``.
    """
    rows, positions, ids, known = inputs.unbind()
    blocks = table[rows]
    block = blocks.gather(1, (positions // block_size).unsqueeze(1)).squeeze(1)
    ids = torch.where(known != 0, ids, last[rows])
    return ids, block * block_size + positions % block_size, positions + 1, blocks
