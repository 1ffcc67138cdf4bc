"""``ForwardBatch``: the rows of all requests of a step, end to end, as tensors; prefill and decode are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tuili.layers.attention import AttentionBackend


@dataclass(frozen=True)
class ForwardBatch:
    """``n`` rows of ``r`` requests.

    ``positions``, ``slots`` (where K and V go) [n]; ``query_start`` [r + 1] bounds each request's rows; ``context_len``
    [r] counts its positions after the step; ``block_table`` [r, blocks].
    """

    positions: torch.Tensor
    slots: torch.Tensor
    query_start: torch.Tensor
    context_len: torch.Tensor
    block_table: torch.Tensor
    max_query_len: int
    attention: AttentionBackend


def assemble(
    starts: Sequence[int],
    counts: Sequence[int],
    table: np.ndarray,
    block_size: int,
    attention: AttentionBackend,
) -> ForwardBatch:
    """The batch of requests that compute ``counts[i]`` positions from ``starts[i]``; ``table`` [r, blocks] int64.

    Whole-array operations only: host work per step is O(batch), whatever the context (law 13).
    """
    first = np.asarray(starts, np.int64)
    count = np.asarray(counts, np.int64)
    bounds = np.zeros(len(first) + 1, np.int64)
    np.cumsum(count, out=bounds[1:])
    positions = np.arange(bounds[-1]) + np.repeat(first - bounds[:-1], count)
    owner = np.repeat(np.arange(len(first)), count)
    slots = table[owner, positions // block_size] * block_size + positions % block_size
    context = first + count
    columns = -(-int(context.max()) // block_size)
    return ForwardBatch(
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots),
        query_start=torch.from_numpy(bounds),
        context_len=torch.from_numpy(context),
        block_table=torch.from_numpy(np.ascontiguousarray(table[:, :columns])),
        max_query_len=int(count.max()),
        attention=attention,
    )


def spread(
    rows: torch.Tensor,
    starts: torch.Tensor,
    bounds: torch.Tensor,
    count: int,
    max_query_len: int,
    table: torch.Tensor,
    block_size: int,
    attention: AttentionBackend,
) -> ForwardBatch:
    """``assemble`` on a device, which keeps the block table of every row there: [rows, blocks] int64.

    Of requests with ``rows`` of the table, from positions ``starts`` [r] on, ``count`` positions in all, between
    ``bounds`` [r + 1]. Launches only, nothing is read back; the block table is as wide as it can get, so that shapes
    say nothing of the contexts.
    """
    if count == len(rows):
        owners, positions = rows, starts
    else:
        at = torch.arange(count, device=rows.device)
        request = torch.searchsorted(bounds, at, right=True) - 1
        owners, positions = rows[request], at - bounds[request] + starts[request]
    slots = table[owners, positions // block_size] * block_size + positions % block_size
    return ForwardBatch(positions, slots, bounds, starts + bounds.diff(), table[rows], max_query_len, attention)
